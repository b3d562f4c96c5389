"""What goes wrong in a run, and every method of the table goes on: one compiled scan for each.

A value, a gradient or a curvature that is NaN or infinite at one step; counters at their ends;
landscapes with edges. Methods that look at no value run inside ``optax.apply_if_finite``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gradxform as gx
from tests.methods import METHODS, Method, nested_params, objective, one_of_each
from tests.thinning import every

ROWS = {
    **METHODS,
    "searched_newton": Method(
        lambda: gx.with_line_search(gx.scale_by_newton()), {}, needs=("value", "value_fn")
    ),
    "searched_newton_cg": Method(
        lambda: gx.with_line_search(gx.scale_by_newton_cg(warm_start=0.5)),
        {},
        needs=("value", "value_fn"),
    ),
}
SEARCHED = (
    "bfgs",
    "lbfgs",
    "lbfgs_bounded",
    "nonlinear_cg",
    "searched_newton",
    "searched_newton_cg",
)
NAMES = every(2, [*one_of_each(4), *(name for name in ROWS if name not in METHODS)])
every_row = pytest.mark.parametrize("name", NAMES)

STEPS, FAULTY = 40, 20  # updates of a run, and how many of them are faulty in one run each
KINDS = {
    "value": (np.nan, np.inf, -np.inf),
    "gradient": (np.nan, np.inf, -np.inf),
    "curvature": (np.nan, np.inf),
    "objective": (np.nan, np.inf),  # all of these at once, and at whatever point it is evaluated
}
HALF, LAST = 2**30, 2**31 - 1  # of the counters' range


class Lane(NamedTuple):
    """What is special about one run: a fault at one step, and where it starts."""

    step: int = -1
    value: float = 0.0
    gradient: float = 0.0  # of one entry
    curvature: float = 0.0
    objective: float = 0.0
    shift: float = 0.0  # of the parameters and of the minimum
    count: int = 0  # of all counters at the start


FAULTS = [
    (kind, Lane(step, **{kind: bad}))
    for kind, values in KINDS.items()
    for bad in values
    for step in range(FAULTY)
]
LANES = [
    Lane(),
    Lane(shift=0.5),
    Lane(count=HALF),
    Lane(count=LAST - 1),
    *(lane for _, lane in FAULTS),
]
SOUND, SHIFTED, COUNTED, SATURATED, FIRST_FAULT = range(5)


@jax.custom_jvp
def _slope(x: jax.Array, bend: jax.Array) -> jax.Array:
    del bend
    return jnp.zeros_like(x)


@_slope.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return _slope(*primals), primals[1] * tangents[0]


@jax.custom_jvp
def curved(x: jax.Array, bend: jax.Array) -> jax.Array:
    """A function whose value and gradient are 0, and its second derivatives ``bend``."""
    del x, bend
    return jnp.zeros(())


@curved.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return curved(*primals), jnp.sum(_slope(*primals) * tangents[0])


class Outcome(NamedTuple):
    path: np.ndarray  # of the parameters to evaluate, after each update
    values: np.ndarray  # of the objective there
    params: Any
    state: Any


def counters(state: Any) -> dict[str, Any]:
    names = (
        "count", "accepted", "resets", "rejected", "non_finite", "total_notfinite", "skipped",
        "modified", "fallbacks", "negative_curvature", "curvature_products", "evaluations",
        "pairs", "restarts",
    )  # fmt: skip
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in leaves
        if getattr(path[-1], "name", None) in names
    }


def started(tx: Any, params: Any, count: jax.Array) -> Any:
    """The first state, with its counters from there on."""
    state = tx.init(params)
    known = counters(state)

    def raised(path: Any, leaf: jax.Array) -> jax.Array:
        is_counter = jax.tree_util.keystr(path) in known
        return jnp.where(count > 0, count, leaf) if is_counter else leaf

    return jax.tree_util.tree_map_with_path(raised, state)


def run(method: Method, lane: Lane) -> Outcome:
    tx = method.build()
    if not method.needs:
        tx = optax.apply_if_finite(tx, max_consecutive_errors=5)

    def body(carry: tuple[Any, Any], count: jax.Array) -> tuple[tuple[Any, Any], Any]:
        params, state = carry
        bad = jax.tree.map(lambda x: jnp.where(count == lane.step, x, 0), lane)

        def sound(p: Any) -> jax.Array:
            return objective(jax.tree.map(lambda x: x - lane.shift, p))

        def value_fn(p: Any) -> jax.Array:
            factor = jnp.where(bad.objective == 0, 1, bad.objective)
            return factor * sound(p) + curved(p["dense"]["kernel"], bad.curvature)

        value, grads = jax.value_and_grad(value_fn)(params)
        grads["dense"]["kernel"] = grads["dense"]["kernel"].at[0, 1].add(bad.gradient)
        updates, state = tx.update(grads, state, params, value=value + bad.value, value_fn=value_fn)
        params = optax.apply_updates(params, updates)
        theta = gx.eval_params(state, params)
        return (params, state), (ravel_pytree(theta)[0], sound(theta))

    start = jax.tree.map(lambda x: x + lane.shift, nested_params())
    carry = start, started(tx, start, lane.count)
    (params, state), (path, values) = jax.lax.scan(body, carry, jnp.arange(STEPS))
    return Outcome(path, values, params, state)


@functools.cache
def outcomes(name: str) -> Outcome:
    """Of all lanes, in one compiled program."""
    lanes = Lane(*(jnp.asarray(column) for column in zip(*LANES, strict=True)))
    found = jax.jit(jax.vmap(functools.partial(run, ROWS[name])))(lanes)
    return jax.tree.map(np.asarray, found)


def lane_of(outcome: Any, lane: int) -> Any:
    return jax.tree.map(lambda x: x[lane], outcome)


def sees(name: str, kind: str) -> bool:
    """Whether the method looks at what the fault is in."""
    needs = ROWS[name].needs
    by_itself = name in ("coordinate_descent", "coordinate_descent_random")  # its gradients
    return {
        "value": "value" in needs,
        "gradient": not by_itself,
        "curvature": "value_fn" in needs,
        "objective": True,
    }[kind]


EVENTS = ("non_finite", "total_notfinite", "skipped", "modified", "fallbacks", "rejected")


@every_row
def test_a_fault_at_one_step_is_survived_and_counted(name: str) -> None:
    found = outcomes(name)
    assert np.isfinite(found.path).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.params))
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(found.state))

    start, end = float(objective(nested_params())), found.values[SOUND, -1]
    assert end < 0.5 * start
    counts = [x for path, x in counters(found.state).items() if path.endswith(EVENTS)]
    for i, (kind, lane) in enumerate(FAULTS, FIRST_FAULT):
        events = sum(int(x[i] - x[SOUND]) for x in counts)
        if sees(name, kind):
            # a search asks for curvature at accepted points only, K-FAC in every second update
            unasked = kind == "curvature" and name in (*SEARCHED, "scale_by_kronecker")
            untouched = unasked and np.array_equal(found.path[i], found.path[SOUND])
            assert events >= 1 or untouched, lane
            assert found.values[i, -1] <= end + 0.02 * (start - end), lane
            before = found.values[i, max(lane.step - 1, 0)]
            assert found.values[i, -1] < before or before < end + 1e-3, lane  # or it was there
        else:
            assert events == 0, lane
            np.testing.assert_array_equal(found.path[i], found.path[SOUND])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SEARCHED])
def test_where_zero_is_does_not_matter(name: str) -> None:
    """A line search apart, whose first trial moves by a part of the largest parameter."""
    path = outcomes(name).path
    np.testing.assert_allclose(path[SHIFTED, :5] - 0.5, path[SOUND, :5], atol=5e-5)


@every_row
def test_counters_stay_at_their_ends(name: str) -> None:
    found = outcomes(name)
    # the memory of a method that a search has thrown away counts its pairs from 0 again
    alive = {k: x for k, x in counters(found.state).items() if x[COUNTED] >= HALF}
    assert alive
    for path, count in alive.items():
        more = int(count[COUNTED]) - HALF
        assert int(count[SATURATED]) == min(LAST - 1 + more, LAST), path
    for count in counters(found.state).values():
        assert (count >= 0).all()
    # and the updates are those of a count long past every correction of the start
    np.testing.assert_array_equal(found.path[SATURATED], found.path[COUNTED])
    gain = found.values[SOUND, 0] - found.values[SOUND, -1]
    assert found.values[SATURATED, -1] <= found.values[SOUND, -1] + 0.05 * gain


def test_a_saturated_count_corrects_no_bias() -> None:
    tx, g = gx.scale_by_adam(b1=0.9, b2=0.99), jnp.asarray([3.0, -0.5])
    for count in (2**30, LAST - 1, LAST):
        state = tx.init(g)._replace(count=jnp.asarray(count, jnp.int32))
        direction, after = tx.update(g, state)
        np.testing.assert_allclose(direction, jnp.sign(g) * 0.1 / 0.01**0.5, rtol=1e-5)
        assert after.count == min(count + 1, LAST)


FORGETTING = ("adam", "rmsprop", "rmsprop_momentum", "rmsprop_nesterov", "adadelta")


@pytest.mark.parametrize("name", [name for name, method in ROWS.items() if not method.needs])
def test_gradients_whose_squares_overflow_or_underflow(name: str) -> None:
    """The entries of the others are theirs, and what has a decaying memory moves on."""
    ones = np.ones(3, np.float32)
    spikes = np.array([1e30, 1e-30, -1e30], np.float32)
    grads = np.stack([ones] * 3 + [spikes] * 5 + [ones] * 2000)
    changes = {"b2": 0.9} if name == "adam" else {}  # forgets in as many updates
    tx = METHODS[name].build(**changes)

    def body(state: Any, g: jax.Array) -> Any:
        updates, state = tx.update(g, state, ones)
        return state, (updates, jax.tree.map(lambda x: jnp.isfinite(x).all(), state))

    _, (updates, finite) = jax.lax.scan(body, tx.init(ones), grads)
    assert np.isfinite(updates).all()
    assert all(np.all(x) for x in jax.tree.leaves(finite))
    if name in FORGETTING:
        assert np.abs(updates).max() < 100
        assert updates[-1, 1] < 0  # which had the tiny ones
        assert (updates[-1] < 0.3 * updates[-1, 1]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad"])
def test_moments_of_extreme_half_precision_gradients(name: str, dtype: str) -> None:
    numbers = jnp.finfo(dtype)
    for size in (numbers.max, -numbers.max, numbers.tiny):
        g = jnp.asarray([size], dtype)
        tx = METHODS[name].build(**({"eps": 0.0}))
        state = tx.init(g)
        for _ in range(2):
            updates, state = tx.update(g, state, g)
            assert updates.dtype == g.dtype
            assert jnp.isfinite(updates).all()
            assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))
        if dtype == "float16":  # neither squares overflow nor do they vanish, in float32
            assert jnp.abs(updates[0]) > 1e-2
            assert jnp.sign(updates[0]) == -jnp.sign(g[0])


# -- landscapes


def bowl(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.asarray([1.0, 10.0]) * (x - 1) ** 2)


class Landscape(NamedTuple):
    fn: Any
    start: tuple[float, float]
    tol: float
    minimum: float | None  # of each coordinate, if the method must come there


LANDSCAPES = {
    "edge": Landscape(lambda x: jnp.sum(x - jnp.log(x)), (100.0, 1e-3), 1e-3, 1.0),
    "cliff": Landscape(lambda x: bowl(x) + jnp.where(x[0] < 0.9, 1e6, 0), (40.0, 5.0), 1e-2, 1.0),
    "noise": Landscape(
        lambda x: bowl(x) + 1e-2 * jax.lax.stop_gradient(jnp.sin(1e5 * jnp.sum(x))),
        (40.0, 5.0),
        1e-3,
        1.0,
    ),
    "tiny": Landscape(lambda x: 1e-30 * bowl(x), (40.0, 5.0), 1e-32, 1.0),
    "huge": Landscape(lambda x: 1e30 * bowl(x), (40.0, 5.0), 1e28, 1.0),
    "near overflow": Landscape(lambda x: jnp.sum(jnp.exp(x**2)), (9.0, 1.0), 1e-3, 0.0),
    "plateau": Landscape(lambda x: jnp.sum(x**2 / (1 + x**2)), (30.0, 20.0), 1e-5, None),
    "flat": Landscape(lambda x: jnp.sum(jnp.tanh(x) ** 2), (20.0, 20.0), 1e-5, None),
    "slope": Landscape(lambda x: -jnp.sum(x), (0.0, 1.0), 1e-3, None),
    "hill": Landscape(lambda x: -jnp.sum(x**2), (0.0, 1.0), 1e-3, None),
}
SAFEGUARDED = {
    name: ROWS[name].build
    for name in (
        "coordinate_descent",
        "bfgs",
        "nonlinear_cg",
        "trust_region",
        "trust_region_steihaug",
        "searched_newton",
    )
} | {"hessian_free": lambda: gx.hessian_free(curvature=gx.hessian())}


@pytest.mark.parametrize("name", SAFEGUARDED)
def test_landscapes_with_edges_cliffs_and_no_floor(name: str) -> None:
    fns = [landscape.fn for landscape in LANDSCAPES.values()]

    @jax.jit
    def solve(starts: jax.Array, tols: jax.Array) -> Any:
        def one(case: Any) -> Any:  # a real branch: no gradient of another's NaN
            i, start, tol = case
            fn = functools.partial(jax.lax.switch, i, fns)
            found = gx.minimize(fn, start, SAFEGUARDED[name](), tol=tol, max_steps=300)
            return found.params, found.value, found.grad_norm, found.status

        return jax.lax.map(one, (jnp.arange(len(fns)), starts, tols))

    starts, tols = zip(*((x.start, x.tol) for x in LANDSCAPES.values()), strict=True)
    found = jax.tree.map(np.asarray, solve(jnp.asarray(starts), jnp.asarray(tols)))
    for (label, case), *one in zip(LANDSCAPES.items(), *found, strict=True):
        params, value, grad_norm, status = one
        first = float(case.fn(jnp.asarray(case.start)))
        assert np.isfinite([*params, value, grad_norm]).all(), label
        assert value <= first, label
        assert status != gx.Status.non_finite, label
        assert (status == gx.Status.converged) == (grad_norm <= case.tol), label
        if case.minimum is not None:
            np.testing.assert_allclose(params, case.minimum, atol=1e-2, err_msg=label)
        if label in ("slope", "hill"):  # none of them says that it found a minimum
            assert value < -1e3, label
            ends = (gx.Status.stalled, gx.Status.max_steps, gx.Status.unbounded)
            assert status in ends, label
