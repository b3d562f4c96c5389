"""How many kernels a turn of a compiled loop launches, read from the optimised program."""

import collections
import re
from collections.abc import Iterator

KINDS = ("fusion", "copy", "dot", "custom-call")  #: operations that are kernels

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:true_computation|false_computation|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")


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
