"""What a compiled program sends between devices, read from its text."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

SMALL = 1024  #: bytes up to which a collective carries inner products alone


class Collective(NamedTuple):
    kind: str
    size: int  #: bytes of the result
    loop: str  #: the innermost loop's body, "" outside
    conditional: bool


_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$", re.MULTILINE)
_CALLED = re.compile(r" (while|conditional|call)\(.*")
_WIDTHS = {"pred": 1, "s32": 4, "u32": 4, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}


def collectives(hlo: str) -> list[Collective]:
    """All that a compiled program's text has, each once for each way it is called."""
    parts = list(_COMPUTATION.finditer(hlo))
    ends = [part.start() for part in parts[1:]] + [len(hlo)]
    bodies = {m[2]: hlo[m.end() : end] for m, end in zip(parts, ends, strict=True)}
    entry = next(m[2] for m in parts if m[1])

    def walk(name: str, loop: str, conditional: bool) -> Iterator[Collective]:
        for line in bodies[name].splitlines():
            if found := _COLLECTIVE.search(line):
                yield Collective(found[2], _bytes(found[1]), loop, conditional)
            elif called := _CALLED.search(line):
                names = [n for n in re.findall(r"%([\w.\-]+)", called[0]) if n in bodies]
                body = re.search(r"body=%([\w.\-]+)", line)
                for inner in names:
                    deeper = inner if body and inner == body[1] else loop
                    yield from walk(inner, deeper, conditional or called[1] == "conditional")

    return list(walk(entry, "", False))


def _bytes(result: str) -> int:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
    shapes = ((dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in arrays)
    return sum(_WIDTHS[dtype] * int(np.prod(shape)) for dtype, shape in shapes)


def busiest_loop(found: Sequence[Collective]) -> list[Collective]:
    """The collectives of the loop that sends most, of one iteration: that of CG."""
    loops = {c.loop for c in found if c.loop}
    sent = {loop: sum(c.size for c in found if c.loop == loop) for loop in loops}
    return [c for c in found if c.loop == max(sent, key=lambda name: sent[name])] if sent else []


def is_small(collective: Collective) -> bool:
    return collective.size <= SMALL


def always(found: Sequence[Collective]) -> list[Collective]:
    return [c for c in found if not c.conditional]
