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
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import gradxform as gx
from gradxform.objective import bind

COUNTS, QUICK_COUNTS = (1, 2, 8, 64, 256), (1, 8)
LARGE, DENSE, QUICK = (1024, 1024, 1024), (256, 4, 256), (16, 16)
EXAMPLES = 1024
SMALL = 1024  #: bytes up to which a collective carries inner products alone

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


# -- the problem


def net(params: Any, x: jax.Array) -> jax.Array:
    for layer in params:
        w, b = jax.tree.map(_gathered, layer)
        x = jnp.tanh(x @ w + b)
    return x


def _gathered(x: jax.Array) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim))
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def squared_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((outputs - y) ** 2)


OBJECTIVE = gx.compose(squared_error, net)


def parameters(sizes: Sequence[int], seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, m)) / n**0.5, np.zeros(m)) for n, m in itertools.pairwise(sizes)]


def mesh_of(count: int, kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((count,), ("data",), (kind,), devices=jax.devices()[:count])


def fully_sharded(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Along the first axis that the devices divide; whole on each where there is none."""
    spec: list[str | None] = [None] * len(shape)
    for axis, size in enumerate(shape):
        if size and size % mesh.size == 0:
            spec[axis] = "data"
            break
    return NamedSharding(mesh, PartitionSpec(*spec))


def step(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """One turn of a stock training loop."""

    def turn(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        value, grads = jax.value_and_grad(OBJECTIVE)(params, x=x, y=y)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=OBJECTIVE, x=x, y=y
        )
        return optax.apply_updates(params, updates), state

    return turn


# -- compiled programs


class Abstract(NamedTuple):
    """The arguments of a step, as shapes with shardings."""

    params: Any
    state: Any
    x: Any
    y: Any


def abstract(tx: Any, mesh: Mesh, sizes: Sequence[int], examples: int = EXAMPLES) -> Abstract:
    """What ``init`` makes under ``jax.jit`` of parameters that are only described."""

    def described(shape: Sequence[int], sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), jnp.float32, sharding=sharding)

    params = jax.tree.map(
        lambda p: described(p.shape, fully_sharded(mesh, p.shape)), parameters(sizes)
    )
    program = jax.jit(tx.init).lower(params).compile()
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        program.output_shardings,
    )
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    x, y = (described((examples, size), by_example) for size in (sizes[0], sizes[-1]))
    return Abstract(params, state, x, y)


def compiled_step(tx: Any, given: Abstract) -> Any:
    return jax.jit(step(tx), donate_argnums=(0, 1)).lower(*given).compile()


def compiled_gradient(given: Abstract) -> Any:
    shardings = jax.tree.map(lambda p: p.sharding, given.params)
    gradient = lambda params, x, y: jax.grad(OBJECTIVE)(params, x=x, y=y)
    compiled = jax.jit(gradient, out_shardings=shardings)
    return compiled.lower(given.params, given.x, given.y).compile()


def compiled_products(curvature: Any, given: Abstract) -> Any:
    """A loop of products and nothing else."""

    def loop(params: Any, v: Any, x: jax.Array, y: jax.Array) -> Any:
        product = curvature(bind(OBJECTIVE, {"x": x, "y": y}), params)
        return jax.lax.fori_loop(0, 5, lambda _, v: product(v), v)

    return jax.jit(loop).lower(given.params, given.params, given.x, given.y).compile()


def bytes_on_a_device(tree: Any) -> int:
    """Of arrays, or of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


# -- what a program sends


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
    began = time.perf_counter()
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
        time.perf_counter() - began,
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
    lines = [
        "# Fully sharded parameters on 1 to 256 devices",
        "",
        f"jax {jax.__version__}, compiled for virtual CPU devices in {seconds:.0f} s and not run. "
        "What the columns mean is told at the head of `benchmarks/scaling.py`.",
        "",
        "| method | devices | parameters | state | state / parameters | memory | sent a step "
        "| a CG iteration | the product's own | small collectives in it |",
        "| --- |" + " ---: |" * 9,
    ]
    for row in rows:
        small = "" if row.iteration is None else f"{row.small}"
        cells = [
            row.method,
            f"{row.devices}",
            _size(row.params),
            _size(row.state),
            f"{row.state / row.params:.3g}",
            *map(_size, (row.memory, row.sent, row.iteration, row.own)),
            small,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Another small collective of `trust_region` by Steihaug and `hessian_free` is conditional: "
        "for a residual that falls so far in one iteration that digits would be lost.",
        "",
        "## Bytes of the state for each byte of float32 parameters",
        "",
        "| method | 100 parameters | 1,000 |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {name} | {a:.4g} | {b:.4g} |" for name, (a, b) in state_ratios().items()]
    return "\n".join(lines) + "\n"


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

    began = time.perf_counter()
    rows: list[Row] = []
    for name in ("the gradient alone", *METHODS):
        sizes = DENSE if name in DENSE_METHODS else LARGE
        for count in counts:
            rows.append(measure(name, count, QUICK if options.quick else sizes))
            print(f"{rows[-1].seconds:6.1f} s  {count:3} {name}", file=sys.stderr, flush=True)
        jax.clear_caches()
    text = report(rows, time.perf_counter() - began)
    print(text)
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scaling.md").write_text(text, encoding="utf-8")
        plot(rows, options.out / "scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
