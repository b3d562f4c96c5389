"""``gradxform show``: a config with every key explained."""

from gradxform.lab.commands import endings
from gradxform.lab.commands.request import Request
from gradxform.lab.experiment.problems import ConfigError


def show(request: Request) -> None:
    """Prints a config with all keys, their meanings and their defaults."""
    from gradxform.lab.experiment.load import load_config
    from gradxform.lab.experiment.shown import shown

    try:
        config = load_config(str(request.name), request.settings, for_sweep=False)
    except (ConfigError, OSError) as error:
        endings.fail(str(error))
    print(shown(config), end="")
