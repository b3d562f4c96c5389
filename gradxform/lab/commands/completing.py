"""What the shell can complete: configs, keys of ``--set``, and names of methods."""

import glob
from collections.abc import Iterator

from gradxform.lab.experiment import keys
from gradxform.lab.experiment.catalogue import PACKAGES, methods
from gradxform.lab.experiment.kinds import kinds
from gradxform.lab.experiment.load import shipped_configs


def configs(incomplete: str) -> list[str]:
    """The shipped configs and the TOML files that begin like this.

    >>> configs("digits_r")
    ['digits_race']
    """
    names = [name for name in shipped_configs() if name.startswith(incomplete)]
    start = glob.escape(incomplete)
    return names + sorted(glob.glob(f"{start}*.toml") + glob.glob(f"{start}*/"))


def settings(incomplete: str) -> list[str]:
    """The settings ``key=value`` that begin like this.

    >>> settings("training.ep"), settings("optimizers.x.method=nest")
    (['training.epochs='], ['optimizers.x.method=nesterov'])
    """
    key, equals, value = incomplete.partition("=")
    if not equals:
        return sorted({f"{key}=" for key in _keys() if key.startswith(incomplete)})
    if key.rpartition(".")[2] != "method":
        return []
    names = (m.name.removeprefix("gradxform.") for package in PACKAGES for m in methods(package))
    return [f"{key}={name}" for name in names if name.startswith(value)]


def _keys() -> Iterator[str]:
    """The dotted keys of all kinds of config, without those below a label."""
    todo = [("", kind.schema) for kind in kinds().values()]
    while todo:
        path, table = todo.pop()
        for key, field in table.model_fields.items():
            inner = list(keys.inner_tables(field.annotation))
            todo += [(f"{path}{key}.", part) for part, is_labelled in inner if not is_labelled]
            if not inner:
                yield path + key
