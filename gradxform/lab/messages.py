"""What the command line tells a person: all text passes here before a terminal shows it.

Imports neither JAX nor the rest of the lab.
"""

import io
import re
import sys

# What a terminal obeys rather than shows: C0 and C1 controls but for tab and new line, line
# separators, marks and overrides of the direction of writing, and bytes that are no UTF-8.
_ORDERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: object) -> str:
    r"""A text with its control characters written out, so that a terminal shows them.

    >>> print(plain("a\x1b[2Jb\x9b"))
    a\x1b[2Jb\x9b
    """
    return _ORDERS.sub(lambda found: ascii(found[0])[1:-1], str(text))


def on_one_line(text: object) -> str:
    r"""The same without line breaks, for the name of a file.

    >>> print(on_one_line("a\nb"))
    a\nb
    """
    return plain(text).replace("\n", "\\n").replace("\t", "\\t")


def say(message: str) -> None:
    """Tells a line on stderr, beside the results on stdout."""
    print(f"gradxform: {plain(message)}", file=sys.stderr)


def lacking(error: ModuleNotFoundError) -> str:
    """What to install where a package is missing."""
    package = (error.name or "").partition(".")[0]
    return f'the command needs {package}, which is not installed: pip install "gradxform[lab]"'


def replace_what_cannot_be_shown() -> None:
    """Lets both streams write a question mark where their encoding lacks a character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
