"""Second-order methods on one deep autoencoder, ours and the peers' alike, against Adam.

    python -m benchmarks.curvature [--quick] [--data-dir DIR] [--seconds 10 20 40] [--runs 3]
                                   [--only METHOD ...] [--python kfac_jax=PATH]
                                   [--out benchmarks/results]

**Problem.** Squared error, half of its sum over the pixels in the mean over the images, of an
autoencoder n-250-100-30-100-250-n of sigmoids in float32: MNIST's images with ``--data-dir``, else
scikit-learn's digits. Every weight matrix starts with 15 weights from N(0, 1) for each unit, the
others 0, the biases 0 (Martens, ICML 2010). All methods have the same parameters and batches.

**Processes.** Every run is a process of its own, one at a time. ``--python LIBRARY=PATH`` runs the
methods of a library by another interpreter, which need not have gradxform: kfac-jax 0.0.8 unpacks
what jax 0.9.0 and older return to it and fails with later ones. A peer that is not there, or
fails, is a line.

**Settings.** Each method runs all the settings of its grid for the shortest of the ``--seconds``,
or all of them ``--tune-seconds``, on seed 0; the one with the lowest loss then runs on the seeds
from 1. A method with one setting is not tuned: ``gx.kronecker`` runs with its defaults. The rate of
"gx.adam, cosine" falls to 0 at the end of the run's time; how many updates that is follows from the
time of a gradient before the run. The loss is of the first 5,000 images; it is the last one reached
within the time. Ours and kfac-jax donate
parameters and state. The clock starts when everything is compiled and stands still while the loss
is evaluated.

**First steps.** The time from the imports to the end of the first step, and of the sixth: building,
tracing and compiling the method, and what it compiles anew for later steps. **Gradients a step** is
the mean time of a step over that of one value-and-gradient of the same batch, taken in turns with
the steps from the 21st to the 120th: a mean, because some methods work harder in some steps.
**State** is the memory of what a method keeps besides the parameters, over theirs. **Products** are
with the curvature, whatever part of the batch it is of; K-FAC's solve takes none, its step length
takes the Jacobian's products with two vectors; those of ``gx.kronecker`` are the Jacobian's too.
**Memory** is how far the peak of the process rises above what evaluating the gradient took,
compiler included (Linux alone).

**One product** is what each one after the first costs, linearisation not included, over a
gradient of the same batch in one chunk: in time, and in the operations of the matrix products that
jax is asked for. kfac-jax linearises anew for each product, which costs operations, but not always
time: compilers can move what stays the same out of a loop.
"""

import argparse
import functools
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import peak_mebibytes, shuffled, stopwatch, table, timed, turns

HIDDEN, QUICK_HIDDEN = (250, 100, 30, 100, 250), (10,)
CONNECTIONS = 15  #: of a unit at the start
EVALUATED = 5000  #: images that the loss is of
CHUNKS = 4  #: of a batch
PRODUCTS = 10  #: products that the time of one is the mean of
REPEATS = 9  #: timings that a median is of
UNSETTLED = 20  #: first steps, whose time does not count
TURNS = 100  #: steps after them with a gradient between them
MARKS = 60  #: evaluations of a run: each is at most 7 % later than the one before
FIRST = 6  #: steps after which nothing is compiled any more

Params = list[tuple[jax.Array, jax.Array]]
Settings = Mapping[str, Any]


def model(params: Params, x: jax.Array) -> jax.Array:
    for w, b in params:
        x = jax.nn.sigmoid(x @ w + b)
    return x


def squared_error(outputs: jax.Array, x: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean(jnp.sum((outputs - x) ** 2, axis=1))


def objective(params: Params, x: jax.Array) -> jax.Array:
    return squared_error(model(params, x), x)


# -- the methods: each library is imported in the process that runs it


class Running(NamedTuple):
    """A method on the objective."""

    start: Callable[[Params, jax.Array], Any]  #: what the first step begins with
    step: Callable[[Any, jax.Array], Any]
    params: Callable[[Any], Params]
    products: Callable[[Any], Any]  #: made so far


Prepare = Callable[[int, Settings], Running]  #: of the batch size


class Method(NamedTuple):
    name: str
    library: str
    prepare: Prepare
    grid: tuple[Settings, ...]
    annealed: bool = False  #: whether ``updates`` is set, the number that fits into the time


def ours(make: Callable[[Any, int, Settings], Any], info: Callable[[Any], Any]) -> Prepare:
    """A transformation of gradxform, and where in its state the products are counted."""

    def prepare(batch_size: int, settings: Settings) -> Running:
        gx = importlib.import_module("gradxform")
        tx = make(gx, batch_size, settings)
        value_fn = gx.compose(squared_error, model)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(carry: Any, x: jax.Array) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(value_fn)(params, x=x)
            updates, state = tx.update(
                grads, state, params, value=value, grad=grads, value_fn=value_fn, x=x
            )
            return jax.tree.map(jnp.add, params, updates), state

        return Running(
            start=lambda params, x: jax.tree.map(jnp.copy, (params, tx.init(params))),
            step=step,
            params=lambda carry: carry[0],
            products=lambda carry: info(carry[1]),
        )

    return prepare


def adam(gx: Any, batch_size: int, settings: Settings) -> Any:
    rate = settings["learning_rate"]
    if "updates" in settings:
        optax = importlib.import_module("optax")
        rate = optax.cosine_decay_schedule(rate, settings["updates"])
    return gx.adam(rate)


def hessian_free(gx: Any, batch_size: int, settings: Settings) -> Any:
    diagonal = gx.hutchinson_diagonal(power=0.75) if settings["preconditioned"] else None
    return gx.hessian_free(
        curvature_batch_size=batch_size // 4,
        maxiter=settings["maxiter"],
        preconditioner=diagonal,
    )


def with_kronecker(gx: Any, batch_size: int, settings: Settings) -> Any:
    """Few iterations of conjugate gradients, with the Kronecker factors as preconditioner."""
    inverse = gx.kronecker_inverse(samples=1)
    if "damping" in settings:
        curvature = gx.gauss_newton()
        return gx.newton_cg(
            curvature=curvature, tol=0.0, forcing="fixed", preconditioner=inverse, **settings
        )
    quarter = batch_size // 4
    return gx.hessian_free(curvature_batch_size=quarter, preconditioner=inverse, **settings)


def newton_cg(gx: Any, batch_size: int, settings: Settings) -> Any:
    return gx.newton_cg(curvature=gx.gauss_newton(), **settings)


def kfac(batch_size: int, settings: Settings) -> Running:
    """K-FAC with everything adaptive, as kfac-jax's own documentation begins."""
    kfac_jax = importlib.import_module("kfac_jax")

    def registered(params: Params, x: jax.Array) -> jax.Array:
        outputs = model(params, x)
        kfac_jax.register_squared_error_loss(outputs, x, weight=0.5)
        return squared_error(outputs, x)

    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(registered),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        min_damping=1e-4,
        num_burnin_steps=0,
        **settings,
    )
    key = jax.random.key(0)

    def start(params: Params, x: jax.Array) -> Any:
        params = jax.tree.map(jnp.copy, params)  # a step overwrites them
        return params, optimizer.init(params, key, x), 0

    def step(carry: Any, x: jax.Array) -> Any:
        params, state, count = carry
        params, state, _ = optimizer.step(
            params, state, jax.random.fold_in(key, count), batch=x, global_step_int=count
        )
        return params, state, count + 1

    return Running(start, step, lambda carry: carry[0], lambda carry: 0)


def import_somax() -> Any:
    somax = importlib.import_module("somax")
    if not hasattr(somax, "sgn_mse"):
        raise ImportError("another library of the name somax is installed: it is python-somax")
    return somax


def somax_sgn(batch_size: int, settings: Settings) -> Running:
    """Gauss–Newton with conjugate gradients.

    The damping is constant: Somax's adaptive one compares the model with a loss that is a mean over
    the outputs, where its gradient is of their sum.
    """
    method = import_somax().sgn_mse(predict_fn=model, **settings)

    @jax.jit
    def step(carry: Any, x: jax.Array) -> Any:
        params, state, products = carry
        params, state, info = method.step(params, {"x": x, "y": x}, state, jax.random.key(0))
        iterations = info["cg_iters"]  # the first residual and every tenth take one more
        return params, state, products + iterations + 1 + iterations // 10

    return Running(
        start=lambda params, x: (params, method.init(params), jnp.array(0, jnp.int32)),
        step=step,
        params=lambda carry: carry[0],
        products=lambda carry: carry[2],
    )


def grid(**choices: Sequence[Any]) -> tuple[Settings, ...]:
    """All combinations, those of the first choices first."""
    settings: list[dict[str, Any]] = [{}]
    for name, values in choices.items():
        settings = [{**some, name: value} for some in settings for value in values]
    return tuple(settings)


METHODS = (
    Method(
        "gx.adam",
        "gradxform",
        ours(adam, lambda state: 0),
        grid(learning_rate=(3e-3, 1e-3, 1e-2)),
    ),
    Method(
        "gx.adam, cosine",
        "gradxform",
        ours(adam, lambda state: 0),
        grid(learning_rate=(1e-2, 3e-3, 2e-2)),
        annealed=True,
    ),
    Method(
        "gx.hessian_free",
        "gradxform",
        ours(hessian_free, lambda state: state.info.curvature_products),
        grid(preconditioned=(True, False), maxiter=(30, 100)),
    ),
    Method(
        "gx.newton_cg",
        "gradxform",
        ours(newton_cg, lambda state: state[0].info.curvature_products),
        grid(damping=(0.1, 0.01, 1.0, 10.0), maxiter=(20,)),
    ),
    Method(
        "gx.hessian_free, Kronecker",
        "gradxform",
        ours(with_kronecker, lambda state: state.info.curvature_products),
        grid(maxiter=(1, 2, 4, 8)),
    ),
    Method(
        "gx.newton_cg, Kronecker",
        "gradxform",
        ours(with_kronecker, lambda state: state[0].info.curvature_products),
        grid(damping=(0.01,), maxiter=(1, 2, 4, 8)),
    ),
    Method(
        "gx.kronecker",
        "gradxform",
        ours(lambda gx, *_: gx.kronecker(), lambda state: state.info.curvature_products),
        ({},),
    ),
    Method("kfac-jax", "kfac_jax", kfac, grid(initial_damping=(1.0, 0.1, 10.0, 100.0))),
    Method("Somax sgn_mse", "somax", somax_sgn, grid(lam0=(0.1, 0.01, 1.0, 10.0), maxiter=(20,))),
)
DISTRIBUTIONS = {"gradxform": "gradxform", "kfac_jax": "kfac-jax", "somax": "python-somax"}


# -- a run, in the process that makes it


def batches(x: np.ndarray, size: int, seed: int) -> Iterator[jax.Array]:
    return (jnp.asarray(x[chosen]) for chosen in shuffled(len(x), size, seed))


def nbytes(arrays: Any) -> int:
    return sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(arrays))


def run_method(task: Mapping[str, Any], x: np.ndarray, params: Params) -> dict[str, Any]:
    (method,) = (m for m in METHODS if m.name == task["method"])
    importlib.import_module(method.library)
    feed = lambda: batches(x, task["batch_size"], task["seed"])
    start_batch = next(feed())
    gradient = jax.jit(jax.value_and_grad(objective))
    timed(lambda: gradient(params, start_batch))
    memory, settings = peak_mebibytes(), task["settings"]
    if method.annealed:
        alone = turns({"gradient": lambda: gradient(params, start_batch)}, TURNS // 2)["gradient"]
        settings = {**settings, "updates": math.ceil(max(task["seconds"]) / statistics.mean(alone))}

    seconds = stopwatch()
    running = method.prepare(task["batch_size"], settings)
    carry, first = running.start(params, start_batch), []
    for batch in itertools.islice(feed(), FIRST):
        carry = jax.block_until_ready(running.step(carry, batch))
        first.append(seconds())

    loss, evaluated = jax.jit(objective), jnp.asarray(x[:EVALUATED])
    marks = sorted({*np.geomspace(*task["marks"]).tolist(), *task["seconds"]})
    curve, steps, gradients, clock = [float(loss(params, evaluated))], [], [], 0.0
    carry = running.start(params, start_batch)
    for batch in feed():
        kept = jax.tree.map(jnp.copy, running.params(carry))
        took, carry = timed(functools.partial(running.step, carry, batch))
        steps.append(took)
        clock += took
        if UNSETTLED < len(steps) <= UNSETTLED + TURNS:
            gradients.append(timed(functools.partial(gradient, kept, batch))[0])
        passed = sum(mark < clock for mark in marks) - len(curve) + 1
        if passed > 0:
            curve += passed * [float(loss(kept, evaluated))]
        if len(curve) > len(marks):
            break
    settled = steps[UNSETTLED : UNSETTLED + TURNS] or steps
    return {
        "first": first[0],
        "sixth": first[-1],
        "step": statistics.mean(settled),
        "gradient": statistics.mean(gradients) if gradients else math.nan,
        "state": nbytes(carry) / nbytes(params) - 1,
        "products": int(running.products(carry)) / len(steps),
        "memory": peak_mebibytes() - memory,
        "times": [0.0, *marks],
        "curve": curve,
    }


# -- what a product costs

Product = Callable[[Params], Params]
Curved = Callable[[Params, jax.Array], Product]  #: of parameters and a batch


def gradxform_products() -> dict[str, Curved]:
    gx = importlib.import_module("gradxform")

    def curved(name: str, chunks: int, recompute: bool) -> Curved:
        def product(params: Params, x: jax.Array) -> Product:
            value_fn = gx.compose(squared_error, model, chunks=chunks, recompute=recompute, x=x)
            return getattr(gx, name)()(value_fn, params)

        return product

    found = {}
    for name in ("gauss_newton", "hessian"):
        found[f"gx.{name}"] = curved(name, 1, True)
        found[f"gx.{name}, {CHUNKS} chunks kept"] = curved(name, CHUNKS, False)
        found[f"gx.{name}, {CHUNKS} chunks computed anew"] = curved(name, CHUNKS, True)
    return found


def kfac_products() -> dict[str, Curved]:
    kfac_jax = importlib.import_module("kfac_jax")

    def registered(params: Params, x: jax.Array) -> jax.Array:
        outputs = model(params, x)
        kfac_jax.register_squared_error_loss(outputs, x, weight=0.5)
        return squared_error(outputs, x)

    implicit = kfac_jax.ImplicitExactCurvature(registered, batch_size_extractor=len)

    def ggn(params: Params, x: jax.Array) -> Product:
        return lambda v: implicit.multiply_ggn((params, x), v)

    def hessian(params: Params, x: jax.Array) -> Product:
        return lambda v: implicit.multiply_hessian((params, x), v)

    return {"kfac-jax multiply_ggn": ggn, "kfac-jax multiply_hessian": hessian}


def somax_products() -> dict[str, Curved]:
    import_somax()
    ggn_operator = importlib.import_module("somax.curvature.ggn_mse").GGNMSE(predict_fn=model)
    hessian_operator = importlib.import_module("somax.curvature.hessian").ExactHessian(
        loss_fn=lambda params, batch: objective(params, batch["x"])
    )

    def curved(operator: Any) -> Curved:
        def product(params: Params, x: jax.Array) -> Product:
            state, _ = operator.init(params, {"x": x, "y": x}, with_grad=False)
            return lambda v: operator.matvec(params, state, v)

        return product

    operators = {"Somax GGNMSE": ggn_operator, "Somax ExactHessian": hessian_operator}
    return {name: curved(operator) for name, operator in operators.items()}


PRODUCTS_OF = {
    "gradxform": gradxform_products,
    "kfac_jax": kfac_products,
    "somax": somax_products,
}


def dot_operations(jaxpr: Any) -> float:
    """The operations of all matrix products of a program; a loop counts as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
            continue
        for part in jax.tree.leaves(list(equation.params.values())):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                total += equation.params.get("length", 1) * dot_operations(part)
    return total


def run_products(task: Mapping[str, Any], x: np.ndarray, params: Params) -> dict[str, Any]:
    batch = next(batches(x, task["batch_size"], task["seed"]))
    gradient = jax.jit(jax.grad(objective))
    operations = dot_operations(jax.make_jaxpr(gradient)(params, batch).jaxpr)
    curvatures = PRODUCTS_OF[task["library"]]()
    costs = {name: cost_of(curved, gradient, params, batch) for name, curved in curvatures.items()}
    return {
        name: {**cost, "operations": cost["operations"] / operations}
        for name, cost in costs.items()
    }


def cost_of(
    curved: Curved, gradient: Callable[..., Any], params: Params, x: jax.Array
) -> dict[str, float]:
    """Of a product after the first one, in a power iteration."""

    def iterate(count: int, params: Params, x: jax.Array, v: Params) -> Params:
        product = curved(params, x)

        def body(_: Any, v: Params) -> Params:
            new = product(v)
            norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(new)))
            return jax.tree.map(lambda leaf: leaf / norm, new)

        return jax.lax.fori_loop(0, count, body, v)

    start = jax.tree.map(jnp.ones_like, params)
    once, many = (jax.jit(functools.partial(iterate, count)) for count in (1, 1 + PRODUCTS))
    few, all_ = (
        dot_operations(jax.make_jaxpr(program)(params, x, start).jaxpr) for program in (once, many)
    )

    times = turns(
        {
            "once": lambda: once(params, x, start),
            "many": lambda: many(params, x, start),
            "gradient": lambda: gradient(params, x),
        },
        REPEATS,
    )
    products = [(b - a) / PRODUCTS for a, b in zip(times["once"], times["many"], strict=True)]
    ratios = (one / alone for one, alone in zip(products, times["gradient"], strict=True))
    return {
        "seconds": statistics.median(products),
        "time": statistics.median(ratios),
        "operations": (all_ - few) / PRODUCTS,
    }


# -- the runs, from outside


class Failure(Exception):
    """What a process died of, in a line."""


class Bench(NamedTuple):
    """How to run a task in a process of its own."""

    file: Path  #: images and parameters
    pythons: Mapping[str, str]  #: by library
    batch_size: int

    def __call__(self, library: str, **task: Any) -> dict[str, Any]:
        task |= {"file": str(self.file), "library": library, "batch_size": self.batch_size}
        command = [self.pythons.get(library, sys.executable), "-m", "benchmarks.curvature"]
        done = subprocess.run(
            [*command, "--task", json.dumps(task)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line and line[0] not in " -"]
            errors = [line for line in lines if "Error: " in line or "Exception: " in line]
            raise Failure((errors or lines or [f"exit status {done.returncode}"])[-1])
        return json.loads(done.stdout.splitlines()[-1])


def run_task(task: Mapping[str, Any]) -> dict[str, Any]:
    with np.load(task["file"]) as file:
        x = file["x"]
        leaves = [jnp.asarray(file[f"{task['seed']}_{i}"]) for i in range(file["leaves"])]
    params = list(zip(leaves[::2], leaves[1::2], strict=True))
    found = run_method(task, x, params) if "method" in task else run_products(task, x, params)
    version = importlib.metadata.version(DISTRIBUTIONS[task["library"]])
    return {"found": found, "version": version, "jax": jax.__version__}


def start_params(sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """Martens's sparse start: weights and biases of the layers in turn."""
    rng = np.random.default_rng(seed)
    leaves = []
    for fan_in, units in itertools.pairwise(sizes):
        w = np.zeros((fan_in, units), np.float32)
        for unit in range(units):
            connected = rng.permutation(fan_in)[:CONNECTIONS]
            w[connected, unit] = rng.normal(size=len(connected))
        leaves += [w, np.zeros(units, np.float32)]
    return leaves


def save_problem(path: Path, x: np.ndarray, hidden: Sequence[int], seeds: Iterable[int]) -> None:
    width = x.shape[1]
    arrays: dict[str, Any] = {"x": x}
    for seed in seeds:
        leaves = start_params([width, *hidden, width], seed)
        arrays |= {f"{seed}_{i}": leaf for i, leaf in enumerate(leaves)}
        arrays["leaves"] = len(leaves)
    np.savez(path, **arrays)


# -- the report


class Outcome(NamedTuple):
    """What became of a method: its chosen setting's runs."""

    method: Method
    settings: Settings
    tuned: Sequence[tuple[Settings, float]]  #: the loss of each setting of the grid
    runs: Sequence[Mapping[str, Any]]
    versions: str

    def median(self, name: str) -> float:
        return statistics.median(run[name] for run in self.runs)

    def gradients(self) -> float:
        return statistics.median(run["step"] / run["gradient"] for run in self.runs)

    def losses(self, seconds: float) -> list[float]:
        return [finite(run["curve"][run["times"].index(seconds)]) for run in self.runs]

    def times_to(self, bounds: Sequence[float]) -> list[float]:
        """When each run is first seen at its bound or below; infinite if it never is."""

        def of_run(run: Mapping[str, Any], bound: float) -> float:
            pairs = zip(run["times"], map(finite, run["curve"]), strict=True)
            return next((at for at, loss in pairs if loss <= bound), math.inf)

        return list(map(of_run, self.runs, bounds))


def finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def describe(settings: Settings) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "defaults"


def compare(
    bench: Bench, method: Method, seconds: Sequence[float], tune: float, runs: int
) -> Outcome:
    """Chooses the setting and runs it; without time or need to choose, runs the first."""

    def run(settings: Settings, seed: int, seconds: Sequence[float]) -> dict[str, Any]:
        marks = (max(seconds) / 60, max(seconds), MARKS)
        task = {"method": method.name, "settings": settings, "seed": seed}
        answer = bench(method.library, **task, seconds=seconds, marks=marks)
        first = answer["found"]["first"]
        print(f"{method.name} {describe(settings)}: {first:.1f} s to step", file=sys.stderr)
        return answer

    tuned, chosen = [], method.grid[0]
    if tune > 0 and len(method.grid) > 1:
        for settings in method.grid:
            found = run(settings, 0, [tune])["found"]
            tuned.append((settings, finite(found["curve"][-1])))
        chosen = min(tuned, key=lambda pair: pair[1])[0]
    answers = [run(chosen, seed, seconds) for seed in range(1, runs + 1)]
    versions = f"{method.library} {answers[0]['version']}, jax {answers[0]['jax']}"
    return Outcome(method, chosen, tuned, [a["found"] for a in answers], versions)


def cost_table(outcomes: Iterable[Outcome]) -> str:
    head = ["method", "first step s", "first six s", "ms a step", "gradients a step"]
    head += ["state / parameters", "products a step", "memory MB", "of"]

    def row(outcome: Outcome) -> list[str]:
        return [
            outcome.method.name,
            f"{outcome.median('first'):.1f}",
            f"{outcome.median('sixth'):.1f}",
            f"{1e3 * outcome.median('step'):.1f}",
            f"{outcome.gradients():.1f}",
            f"{outcome.median('state'):.1f}",
            f"{outcome.median('products'):.1f}",
            f"{outcome.median('memory'):.0f}",
            outcome.versions,
        ]

    return table(head, map(row, outcomes))


def loss_table(outcomes: Iterable[Outcome], seconds: Sequence[float]) -> str:
    def cell(losses: Sequence[float]) -> str:
        spread = f" ({min(losses):.3g} to {max(losses):.3g})" if len(losses) > 1 else ""
        return f"{statistics.median(losses):.3g}{spread}"

    rows = [
        [o.method.name, describe(o.settings), *(cell(o.losses(at)) for at in seconds)]
        for o in outcomes
    ]
    return table(["method", "setting", *(f"{at:g} s" for at in seconds)], rows)


def against_adam(outcomes: Sequence[Outcome], seconds: Sequence[float]) -> str:
    """Which methods are below the first one, at which time."""
    first, *others = outcomes
    lines = []
    for at in seconds:
        bound = statistics.median(first.losses(at))
        below = [o.method.name for o in others if statistics.median(o.losses(at)) < bound]
        lines.append(f"After {at:g} s below {first.method.name}: {', '.join(below) or 'none'}.")
    return " ".join(lines)


def kronecker_table(outcomes: Sequence[Outcome], seconds: Sequence[float]) -> str:
    """How soon gx.kronecker is where the others end, and what it costs; "" without it.

    Each run is compared with the one on the same seed.
    """
    named = {o.method.name: o for o in outcomes}
    if "gx.kronecker" not in named:
        return ""
    ours, rows, last = named["gx.kronecker"], [], max(seconds)

    def add(measure: str, measured: float, limit: float | None = None) -> None:
        rows.append([measure, f"{measured:.2f}", "" if limit is None else f"{limit:g}"])

    def add_time(other: Outcome, at: float, limit: float | None = None) -> None:
        measure = f"time to the loss of {other.method.name} after {at:g} s, over {at:g} s"
        times = ours.times_to(other.losses(at))
        add(measure, statistics.median(times) / at, limit)

    adams = [o for o in outcomes if o.method.name.startswith("gx.adam")]
    if adams:
        best = min(adams, key=lambda o: statistics.median(o.losses(last)))
        add_time(best, last, 0.2)
    if "kfac-jax" in named:
        kfac = named["kfac-jax"]
        add_time(kfac, sorted(seconds)[-2:][0], 0.7)
        pairs = zip(ours.losses(last), kfac.losses(last), strict=True)
        add(
            f"loss after {last:g} s over that of kfac-jax",
            statistics.median(a / b for a, b in pairs),
        )
    add("gradients a step", ours.gradients(), 2.5)
    add("state / parameters", ours.median("state"), 8)
    add("first step s", ours.median("first"), 3)
    return table(["gx.kronecker", "measured", "aim: at most"], rows)


def products_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    head = ["product", "time / gradient's", "operations / gradient's", "ms"]
    cells = (
        [name, f"{row['time']:.2f}", f"{row['operations']:.2f}", f"{1e3 * row['seconds']:.1f}"]
        for name, row in rows.items()
    )
    return table(head, cells)


def plot(outcomes: Iterable[Outcome], title: str, path: Path) -> None:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    plt = importlib.import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for outcome, style in zip(outcomes, itertools.cycle(["-", "--", "-.", ":"])):
        curves = np.array([run["curve"] for run in outcome.runs], float)
        curves, times = curves[:, 1:], outcome.runs[0]["times"][1:]
        (line,) = axes.plot(times, np.median(curves, axis=0), style, label=outcome.method.name)
        low, high = curves.min(axis=0), curves.max(axis=0)
        axes.fill_between(times, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", title=title, ylabel="squared error, halved")
    axes.set_xlabel("seconds after compiling")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def load_images(data_dir: Path | None) -> tuple[str, np.ndarray]:
    data = importlib.import_module("gradxform.lab.data.sets")
    loaded = data.load("digits") if data_dir is None else data.load("mnist", data_dir)
    x = loaded.train.x.reshape(len(loaded.train.x), -1) / loaded.scale
    return loaded.name, x.astype(np.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="second-order methods on a deep autoencoder")
    parser.add_argument("--quick", action="store_true", help="a small net, nothing written")
    parser.add_argument("--data-dir", type=Path, help="MNIST's files; else scikit-learn's digits")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 20, 40])
    parser.add_argument("--tune-seconds", type=float, help="of each setting")
    parser.add_argument("--runs", type=int, default=3)
    names = [method.name for method in METHODS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="METHOD")
    parser.add_argument("--python", action="append", default=[], metavar="LIBRARY=PATH")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.task:
        print(json.dumps(run_task(options.task)))
        return 0
    quick, seconds, runs = options.quick, sorted(options.seconds), options.runs
    tune = min(seconds) if options.tune_seconds is None else options.tune_seconds
    if quick:
        seconds, runs, tune = [0.5, 1.0], 1, 0.0

    name, x = load_images(options.data_dir)
    hidden = QUICK_HIDDEN if quick else HIDDEN
    batch_size = 1000 if len(x) >= 5000 else 500
    net = "-".join(map(str, (x.shape[1], *hidden, x.shape[1])))
    outcomes, missing, products = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.npz"
        save_problem(file, x, hidden, range(runs + 1))
        pythons = dict(pair.split("=", 1) for pair in options.python)
        bench = Bench(file, pythons, batch_size)
        for method in (method for method in METHODS if method.name in options.only):
            try:
                outcomes.append(compare(bench, method, seconds, tune, runs))
            except Failure as failure:
                if method.library == "gradxform":
                    raise
                missing.append(f"{method.name}: not available: {failure}")
        for library in dict.fromkeys(outcome.method.library for outcome in outcomes):
            try:
                products |= bench(library, seed=0)["found"]
            except Failure as failure:
                missing.append(f"products of {library}: not available: {failure}")

    text = report(outcomes, products, missing, seconds, f"{name}, {net}, batch {batch_size}")
    print(text)
    if not quick:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "curvature.md").write_text(text, encoding="utf-8")
        plot(outcomes, f"{name}, {net}", options.out / "curvature.png")
    return 0


def report(
    outcomes: Sequence[Outcome],
    products: Mapping[str, Mapping[str, float]],
    missing: Sequence[str],
    seconds: Sequence[float],
    problem: str,
) -> str:
    tuned = [
        f"- {o.method.name}: " + "; ".join(f"{describe(s)}: {loss:.3g}" for s, loss in o.tuned)
        for o in outcomes
        if o.tuned
    ]
    lines = [
        f"# Second-order methods on an autoencoder: {problem}",
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores; medians of "
        f"{len(outcomes[0].runs)} runs. What the columns mean is told at the head of "
        "`benchmarks/curvature.py`.",
        "## Cost",
        cost_table(outcomes),
        "## Loss after compiling and so many seconds: median (least to greatest)",
        loss_table(outcomes, seconds),
        against_adam(outcomes, seconds),
        kronecker_table(outcomes, seconds),
        "## One product",
        products_table(products),
    ]
    if tuned:
        lines += ["## Settings tried, with their loss", "\n".join(tuned)]
    if missing:
        lines += ["## Not measured", "\n".join(f"- {line}" for line in missing)]
    return "\n\n".join(line for line in lines if line) + "\n"


if __name__ == "__main__":
    sys.exit(main())
