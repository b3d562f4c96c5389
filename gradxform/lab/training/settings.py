"""How each optimiser trains, and the collection of what is wrong with several of them."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from gradxform.lab.experiment.problems import ConfigError, Problem
from gradxform.lab.training.batching import Order

# errors that a function of any package may raise for an unusable value while it is traced
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


class Settings(NamedTuple):
    """How to train one optimiser."""

    epochs: int
    batch_size: Any  #: a number, after "full" has been replaced
    order: Order
    max_seconds: float


def settings_of(
    common: Settings,
    overrides: Mapping[str, Mapping[str, Any]],
    labels: Iterable[str],
    size: int,
) -> dict[str, Settings]:
    """The settings of each label."""
    for label in overrides:
        if label not in labels:
            raise ValueError(f"overrides[{label!r}]: no transformation has this label")
    found = {}
    for label in labels:
        own = common._replace(**overrides.get(label, {}))
        whole = own.batch_size == "full"
        found[label] = own._replace(batch_size=size if whole else min(own.batch_size, size))
    return found


@contextlib.contextmanager
def collecting(problems: list[Problem | str], path: str) -> Iterator[None]:
    """Adds errors to ``problems``, so that one error can report all optimisers."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems
    except _REFUSALS as error:
        problems.append(Problem(path, str(error) or type(error).__name__))
