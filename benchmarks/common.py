"""What the benchmarks share: a Markdown table, a timer, turns, minibatches and memory."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table in Markdown; the columns after the first ``texts`` hold numbers, to the right.

    >>> print(table(["method", "ms"], [["sgd", "1.2"]]))
    | method | ms |
    | --- | ---: |
    | sgd | 1.2 |
    """
    ruler = [*["---"] * texts, *["---:"] * (len(head) - texts)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ruler, *rows))


def stopwatch() -> Callable[[], float]:
    """Starts a clock; the result tells how many seconds have passed."""
    started = time.perf_counter()
    return lambda: time.perf_counter() - started


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until all arrays of the result are computed, and the result."""
    seconds = stopwatch()
    result = jax.block_until_ready(call())
    return seconds(), result


def turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    The calls take turns, so that a ratio within a round compares neighbours in time. The first
    ``warm_up`` rounds, which may compile, are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            seconds, _ = timed(call)
            if turn >= warm_up:
                times[name].append(seconds)
    return times


def repeated(step: Callable[[Any], Any], carry: Any, times: int) -> Callable[[], Any]:
    """A call that makes so many steps, each from where the last one ended."""

    def call() -> Any:
        nonlocal carry
        for _ in range(times):
            carry = step(carry)
        return carry

    return call


def shuffled(examples: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Numbers of the examples of one batch after another, alike in all versions of NumPy.

    Each epoch has a new order; a last batch that would be smaller is left out.
    """
    bits = np.random.PCG64(seed)
    while True:
        order = np.argsort(bits.random_raw(examples))
        for at in range(0, examples - size + 1, size):
            yield order[at : at + size]


def resident_mebibytes() -> float:
    """MiB that this process holds in memory now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mebibytes() -> float:
    """The most MiB that this process has held so far; NaN where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return math.nan
    lines = (line.split() for line in status.splitlines())
    return next((int(line[1]) / 1024 for line in lines if line[:1] == ["VmHWM:"]), math.nan)
