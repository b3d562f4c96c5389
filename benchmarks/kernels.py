"""Kernels that one turn of ``gx.minimize``'s compiled loop launches, and what a solve takes.

    python -m benchmarks.kernels [--methods bfgs lbfgs …] [--out benchmarks/results]

A small problem pays by the kernel, not by the flop. *Kernels*: fusions, copies, matrix products and
calls of libraries in the body of the loop, branches included, of the Rosenbrock chain in ten
variables. The counts depend on the versions of JAX and XLA and on the device alone. *Compile*:
seconds of processor time. *Solve*: the median of many, in microseconds; *an evaluation*: a part of
it. The float64 column is of 64-bit mode, the other of JAX's default.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks.common import table, timed
from testbed.kernels import KINDS, METHODS, compiled, loop_kernels

RUNS = 100


class Row(NamedTuple):
    """What was counted and measured of one method."""

    kernels: int
    parts: str
    compile_seconds: float
    solve: float
    evaluation: float


def measured(method: str) -> Row:
    """Of a new program."""
    began = time.process_time()
    program, start = compiled(method)
    seconds = time.process_time() - began
    kernels = loop_kernels(program.as_text())
    solution = program(start)
    times = [timed(lambda: program(start))[0] for _ in range(RUNS)]
    solve = 1e6 * statistics.median(times)
    parts = " + ".join(str(kernels[kind]) for kind in KINDS)
    return Row(kernels.total(), parts, seconds, solve, solve / int(solution.evaluations))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    for method in options.methods:
        with jax.enable_x64(True):
            double = measured(method)
        single = measured(method)
        rows.append(
            [
                method,
                *(f"{double.kernels} ({double.parts})", str(single.kernels)),
                *(
                    f"{double.compile_seconds:.1f}",
                    f"{double.solve:.0f}",
                    f"{double.evaluation:.1f}",
                ),
            ]
        )
    head = ["method", "kernels, float64", "float32", "compile, s", "solve, µs", "an evaluation, µs"]
    text = table(head, rows)
    print(text)
    if options.out:
        title = "# Kernels of a turn of minimize, Rosenbrock's chain in ten variables, a CPU"
        (options.out / "kernels.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
