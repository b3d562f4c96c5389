"""What is wrong with a config, in words."""

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

CONTROL = r"\x00-\x08\x0b-\x1f\x80-\x9f"  # control characters except tab and new line
PLAIN = "have no control characters"
_MOST_SHOWN, _LONGEST = 100, 2000  # problems to show, and characters of one
_MOST_COMPARED = 500  # names to compare; each takes some time


class Problem(NamedTuple):
    """One problem in a config."""

    path: str  #: dotted path, like ``optimizers.adam.learning_rate``
    message: str

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}"
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
        return re.sub(f"[{CONTROL}]", lambda found: repr(found[0])[1:-1], text)


class ConfigError(Exception):
    """A config cannot be used; ``problems`` lists everything that is wrong."""

    def __init__(self, source: str, problems: Iterable[Problem | str]) -> None:
        self.problems = tuple(problems)
        shown = [f"  {problem}" for problem in self.problems[:_MOST_SHOWN]]
        more = len(self.problems) - len(shown)
        shown += [f"  and {more} more"] if more else []
        super().__init__("\n".join([f"{source}:", *shown]))


def suggest(name: str, valid: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` with the nearest valid name, or the empty string.

    >>> suggest("epoch", ["epochs", "steps"])
    ", did you mean 'epochs'?"
    """
    nearest = difflib.get_close_matches(name, list(valid)[:_MOST_COMPARED], n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""


def either(choices: Iterable[str]) -> str:
    *most, last = (repr(choice) for choice in choices)
    return f"{', '.join(most)} or {last}" if most else last
