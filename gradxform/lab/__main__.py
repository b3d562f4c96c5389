"""The ``gradxform`` command. If a package is missing, it says what to install."""

import sys

from gradxform.lab.experiment.messages import lacking, say


def main() -> None:
    """Runs the command line if the packages of the extra ``lab`` are installed."""
    try:
        from gradxform.lab.cli import main as command

        command()
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "gradxform":
            raise
        say(lacking(error))
        sys.exit(1)
    except KeyboardInterrupt:  # before the command line handles it
        say("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
