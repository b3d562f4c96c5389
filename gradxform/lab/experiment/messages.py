"""Messages of the command line, made safe for a terminal.

Imports neither JAX nor the rest of the lab.
"""

import io
import re
import sys

# Characters that control a terminal instead of being shown: C0 and C1 controls except tab and new
# line, line separators, marks of the writing direction, and bytes that are not UTF-8.
_ORDERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: object) -> str:
    r"""The text with control characters escaped, so that a terminal shows them.

    >>> print(plain("a\x1b[2Jb\x9b"))
    a\x1b[2Jb\x9b
    """
    return _ORDERS.sub(lambda found: ascii(found[0])[1:-1], str(text))


def on_one_line(text: object) -> str:
    r"""Like :func:`plain`, with line breaks escaped too; for file names.

    >>> print(on_one_line("a\nb"))
    a\nb
    """
    return plain(text).replace("\n", "\\n").replace("\t", "\\t")


def say(message: str) -> None:
    """Prints a message on stderr, so that stdout holds only results."""
    print(f"gradxform: {plain(message)}", file=sys.stderr)


def lacking(error: ModuleNotFoundError) -> str:
    """The message for a missing package: what to install."""
    package = (error.name or "").partition(".")[0]
    return f'the command needs {package}, which is not installed: pip install "gradxform[lab]"'


def replace_what_cannot_be_shown() -> None:
    """Makes stdout and stderr print ``?`` for characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
