"""What a step takes of each device, and sends between them, on 1 to 256 devices: compiled, not run.

    python -m benchmarks.scaling [--quick] [--out benchmarks/results]

Every method makes a step of a net of 1024-1024-1024 (2.1 million parameters, the dense methods one
of 256-4-256 with 2,308), in float32, on 1,024 examples in all. The parameters are fully sharded:
each leaf is divided among all devices along its first axis that they divide; the net gathers a
layer before using it. XLA compiles for so many virtual CPU devices in automatic mode and tells

- **state**: the optimiser's, on one device and over the parameters there;
- **memory**: of one device, all that the step takes (batch, parameters, state) and its temporaries;
- **sent a step**: the results of all collectives outside loops, conditional ones included; a
  gradient's own, in the first row, are in all others;
- **CG iteration**: the results of the collectives of one, and how many of them are small: those of
  at most 1 KiB, which carry inner products alone. A product's own are what `v ↦ Hv` in a loop of
  nothing else has.

For CPUs XLA writes a reduce-scatter as an all-reduce of the whole, of which each device then keeps
its part: gradients and products count once whole, where an accelerator sends as much for a part.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import gradxform as gx
from benchmarks.common import stopwatch, table
from testbed.collectives import always, busiest_loop, collectives, is_small
from testbed.sharded import (
    abstract,
    bytes_on_a_device,
    compiled_gradient,
    compiled_products,
    compiled_step,
    mesh_of,
)

COUNTS, QUICK_COUNTS = (1, 2, 8, 64, 256), (1, 8)
LARGE, DENSE, QUICK = (1024, 1024, 1024), (256, 4, 256), (16, 16)

METHODS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: gx.sgd(0.1),
    "momentum": lambda: gx.momentum(0.1),
    "adam": gx.adam,
    "nonlinear_cg": lambda: gx.nonlinear_cg(ravel=False),
    "lbfgs": lambda: gx.lbfgs(ravel=False),
    "newton_cg": gx.newton_cg,
    "trust_region steihaug": lambda: gx.trust_region("steihaug"),
    "hessian_free": gx.hessian_free,
    "bfgs": lambda: gx.bfgs(ravel=False),
    "trust_region": lambda: gx.trust_region(max_size=10_000),
    "newton": gx.newton,
}
DENSE_METHODS = ("bfgs", "trust_region", "newton")
LOOPS = {"newton_cg": "hessian", "trust_region steihaug": "hessian", "hessian_free": "gauss_newton"}


# -- the tables


class Row(NamedTuple):
    method: str
    devices: int
    params: int
    state: int
    memory: int
    sent: int
    iteration: int | None  #: bytes of one of CG
    small: int  #: collectives of it, not the conditional ones
    own: int | None  #: bytes of the product's own
    seconds: float


def measure(name: str, count: int, sizes: Sequence[int]) -> Row:
    seconds = stopwatch()
    mesh, tx = mesh_of(count), METHODS[name]() if name in METHODS else gx.sgd(0.1)
    with jax.set_mesh(mesh):
        given = abstract(tx, mesh, sizes)
        program = compiled_step(tx, given) if name in METHODS else compiled_gradient(given)
        own = None
        if name in LOOPS:
            products = compiled_products(getattr(gx, LOOPS[name])(), given)
            own = sum(c.size for c in busiest_loop(collectives(products.as_text())))
    found, memory = collectives(program.as_text()), program.memory_analysis()
    loop = busiest_loop(found) if name in LOOPS else []
    return Row(
        name,
        count,
        bytes_on_a_device(given.params),
        bytes_on_a_device(given.state),
        memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        sum(c.size for c in found if not c.loop),
        sum(c.size for c in loop) if name in LOOPS else None,
        sum(is_small(c) for c in always(loop)),
        own,
        seconds(),
    )


def state_ratios() -> dict[str, tuple[float, float]]:
    """Bytes of the state over those of the parameters, of 100 and of 1,000 of them."""
    methods = {
        "sgd": gx.sgd(0.1),
        "momentum": gx.momentum(0.1),
        "nesterov": gx.nesterov(0.1),
        "delta_bar_delta": gx.delta_bar_delta(0.1),
        "adagrad": gx.adagrad(0.1),
        "rmsprop": gx.rmsprop(0.1),
        "rmsprop with momentum": gx.rmsprop(0.1, momentum=0.9),
        "adadelta": gx.adadelta(),
        "adam": gx.adam(),
        "polyak_average(sgd)": gx.polyak_average(gx.sgd(0.1)),
        "coordinate_descent": gx.coordinate_descent(),
        "newton": gx.newton(),
        "newton_cg": gx.newton_cg(),
        "hessian_free": gx.hessian_free(),
        "trust_region steihaug": gx.trust_region("steihaug"),
        "nonlinear_cg": gx.nonlinear_cg(),
        "lbfgs, m = 10": gx.lbfgs(),
        "bfgs": gx.bfgs(),
        "trust_region": gx.trust_region(),
    }

    def ratio(tx: Any, size: int) -> float:
        state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct((size,), jnp.float32))
        # numbers of the whole state (counts, lengths) are not of a parameter
        return sum(x.size for x in jax.tree.leaves(state) if x.size >= size) / size

    return {name: (ratio(tx, 100), ratio(tx, 1000)) for name, tx in methods.items()}


def _size(count: int | None) -> str:
    if count is None:
        return ""
    for unit, width in (("MB", 1e6), ("kB", 1e3)):
        if count >= width:
            return f"{count / width:.3g} {unit}"
    return f"{count} B"


def report(rows: Sequence[Row], seconds: float) -> str:
    head = ["method", "devices", "parameters", "state", "state / parameters", "memory"]
    head += ["sent a step", "a CG iteration", "the product's own", "small collectives in it"]
    ratios = ([name, f"{a:.4g}", f"{b:.4g}"] for name, (a, b) in state_ratios().items())
    parts = [
        "# Fully sharded parameters on 1 to 256 devices",
        f"jax {jax.__version__}, compiled for virtual CPU devices in {seconds:.0f} s and not run. "
        "What the columns mean is told at the head of `benchmarks/scaling.py`.",
        table(head, map(_cells, rows)),
        "Another small collective of `trust_region` by Steihaug and `hessian_free` is conditional: "
        "for a residual that falls so far in one iteration that digits would be lost.",
        "## Bytes of the state for each byte of float32 parameters",
        table(["method", "100 parameters", "1,000"], ratios),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> list[str]:
    return [
        row.method,
        f"{row.devices}",
        _size(row.params),
        _size(row.state),
        f"{row.state / row.params:.3g}",
        *map(_size, (row.memory, row.sent, row.iteration, row.own)),
        "" if row.iteration is None else f"{row.small}",
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory, sent = figure.subplots(1, 2)
    names = dict.fromkeys(row.method for row in rows if row.method not in DENSE_METHODS)
    for i, name in enumerate(names):
        own = [row for row in rows if row.method == name]
        style: dict[str, Any] = {"marker": "osv^D*xP+"[i % 9], "markersize": 5, "label": name}
        memory.plot([r.devices for r in own], [r.memory / 1e6 for r in own], **style)
        several = [r for r in own if r.devices > 1]
        sent.plot([r.devices for r in several], [r.sent / 1e6 for r in several], **style)
    memory.set(ylabel="memory of one device (MB)", yscale="log")
    sent.set(ylabel="results of collectives a step,\noutside the loop of CG (MB)", ylim=(0, None))
    for axes in (memory, sent):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("devices")
        axes.grid(color="0.9", linewidth=0.6)
    memory.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="memory and collectives of sharded methods")
    parser.add_argument("--quick", action="store_true", help="a tiny net on 8, nothing written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    counts = QUICK_COUNTS if options.quick else COUNTS
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(counts))

    seconds = stopwatch()
    rows: list[Row] = []
    for name in ("the gradient alone", *METHODS):
        sizes = DENSE if name in DENSE_METHODS else LARGE
        for count in counts:
            rows.append(measure(name, count, QUICK if options.quick else sizes))
            print(f"{rows[-1].seconds:6.1f} s  {count:3} {name}", file=sys.stderr, flush=True)
        jax.clear_caches()
    text = report(rows, seconds())
    print(text)
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scaling.md").write_text(text, encoding="utf-8")
        plot(rows, options.out / "scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
