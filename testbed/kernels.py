"""How many kernels a turn of ``gx.minimize``'s loop launches, read from the compiled program.

    python -m testbed.kernels

prints the counts in JSON, in 64-bit mode.
"""

import collections
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradxform as gx
from gradxform.lab.tasks.surfaces import rosenbrock

KINDS = ("fusion", "copy", "dot", "custom-call")  #: operations that are kernels

METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "bfgs": gx.bfgs,
    "lbfgs": gx.lbfgs,
    "nonlinear_cg": gx.nonlinear_cg,
    "newton with a search": lambda: gx.with_line_search(gx.scale_by_newton()),
    "trust_region": gx.trust_region,
    "trust_region, steihaug": lambda: gx.trust_region("steihaug"),
    "sgd": lambda: gx.sgd(1e-3),
    "adam": lambda: gx.adam(1e-2),
}

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:true_computation|false_computation|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")


def compiled(method: str) -> tuple[Any, jax.Array]:
    """The program of a solve of the Rosenbrock chain in ten variables, and where it starts."""
    start = jnp.tile(jnp.asarray([-1.2, 1.0], dtype=float), 5)

    def solve(params: jax.Array) -> gx.Solution:
        return gx.minimize(rosenbrock, params, METHODS[method](), tol=1e-5, max_steps=1000)

    return jax.jit(solve).lower(start).compile(), start


def loop_kernels(program: str) -> collections.Counter[str]:
    """Kernels by kind in one turn of the longest loop of a program's entry, branches included.

    A loop inside counts as one turn of it.

    Args:
      program: ``jax.jit(f).lower(…).compile().as_text()``.
    """
    computations = _computations(program)
    bodies = re.findall(r" while\(.*body=%?([\w.\-]+)", "\n".join(computations["ENTRY"]))
    counts = [_kernels(computations, body) for body in bodies]
    return max(counts, key=lambda count: count.total(), default=collections.Counter())


def _computations(program: str) -> dict[str, list[str]]:
    """The instructions of each named part of a program."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = "ENTRY" if head[1] else head[2]
            found[name] = []
        elif name and line.startswith("  "):
            found[name].append(line)
    return found


def _kernels(computations: dict[str, list[str]], name: str) -> collections.Counter[str]:
    counts: collections.Counter[str] = collections.Counter()
    for line in computations[name]:
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        kind = instruction[1]
        if kind in KINDS:
            counts[kind] += 1
        if kind in ("conditional", "call", "while"):
            for called in _called(line):
                counts += _kernels(computations, called)
    return counts


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in branches.split(","))


if __name__ == "__main__":
    with jax.enable_x64(True):
        programs = {method: compiled(method)[0].as_text() for method in METHODS}
    print(json.dumps({method: loop_kernels(text).total() for method, text in programs.items()}))
