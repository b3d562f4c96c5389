"""The ``gradxform`` command: a line where what it needs is not installed, else the command line."""

import sys

from gradxform.lab.messages import lacking, say


def main() -> None:
    """Runs the command line, if the packages of the extra ``lab`` are there."""
    try:
        from gradxform.lab.cli import main as command

        command()
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "gradxform":
            raise
        say(lacking(error))
        sys.exit(1)
    except KeyboardInterrupt:  # before the command line could take care of it
        say("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
