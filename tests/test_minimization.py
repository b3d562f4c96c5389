import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.methods import METHODS, nested_params, objective, one_of_each
from tests.thinning import every


def bowl(x: Any) -> jax.Array:
    return jnp.sum(jnp.asarray([1.0, 10.0]) * (x - 1) ** 2)


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


VALUE_AND_GRAD = jax.jit(jax.value_and_grad(objective))


# the others descend in the contract suite
@pytest.mark.parametrize("name", every(2, one_of_each(3), 1))
def test_every_method_minimises(name: str) -> None:
    solution = gx.minimize(objective, nested_params(), METHODS[name].build(), max_steps=300)
    value, grads = VALUE_AND_GRAD(solution.params)
    assert solution.value < 0.6 * VALUE_AND_GRAD(nested_params())[0]
    assert solution.value == pytest.approx(float(value), rel=1e-5)
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads) if g.size)
    assert float(solution.grad_norm) == pytest.approx(largest, rel=1e-3, abs=1e-5)


def test_converges_to_tol() -> None:
    solution = gx.minimize(bowl, jnp.zeros(2), gx.momentum(0.04), tol=1e-5)
    assert solution.status == gx.Status.converged
    assert solution.grad_norm <= 1e-5
    np.testing.assert_allclose(solution.params, 1.0, atol=1e-5)
    assert solution.evaluations == solution.steps + 1
    assert solution.curvature_products == 0


def test_starts_at_the_minimum() -> None:
    solution = gx.minimize(bowl, jnp.ones(2), gx.sgd(0.01))
    assert (solution.status, solution.steps, solution.evaluations) == (gx.Status.converged, 0, 1)


@pytest.mark.parametrize("max_steps", [0, 1, 7])
def test_stops_at_max_steps(max_steps: int) -> None:
    solution = gx.minimize(bowl, jnp.zeros(2), gx.sgd(0.01), max_steps=max_steps)
    assert solution.status == gx.Status.max_steps
    assert (solution.steps, solution.evaluations) == (max_steps, max_steps + 1)


def test_divergence_returns_the_best_point() -> None:
    solution = gx.minimize(bowl, jnp.asarray([0.0, 0.9]), gx.sgd(0.3))
    assert solution.status == gx.Status.non_finite
    assert jnp.isfinite(solution.params).all()
    assert solution.value <= bowl(jnp.asarray([0.0, 0.9]))


def test_a_start_that_is_not_finite_is_reported() -> None:
    solution = gx.minimize(lambda x: jnp.log(x), -1.0, gx.sgd(0.1))
    assert (solution.status, solution.steps) == (gx.Status.non_finite, 0)
    assert solution.params == -1.0


def test_an_edge_of_the_domain() -> None:
    solution = gx.minimize(lambda x: jnp.sqrt(x) + jnp.exp(-x), 0.5, gx.sgd(0.9))
    assert solution.status == gx.Status.non_finite
    assert solution.value <= np.sqrt(0.5) + np.exp(-0.5)


def test_a_worse_stationary_point_is_not_called_converged() -> None:
    """A step too long for the narrow deep well at 0 ends in the wide shallow one at -3."""

    def wells(x: jax.Array) -> jax.Array:
        return -2 * jnp.exp(-(x**2) / 0.02) - jnp.exp(-((x + 3) ** 2) / 2)

    from_the_shallow = gx.minimize(wells, -2.5, gx.sgd(0.3), tol=1e-4)
    from_the_deep = gx.minimize(wells, 0.06, gx.sgd(0.3), tol=1e-4)
    assert from_the_shallow.status == gx.Status.converged
    assert from_the_deep.status == gx.Status.stalled
    assert from_the_deep.params == jnp.float32(0.06)
    assert from_the_deep.value < from_the_shallow.value


def test_counts_the_evaluations_of_an_inner_search() -> None:
    calls = []

    def counted(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(None))
        return bowl(x)

    solution = gx.minimize(counted, jnp.zeros(2), gx.coordinate_descent())
    jax.effects_barrier()
    assert solution.status == gx.Status.converged
    assert int(solution.evaluations) == len(calls)


def test_default_method_is_quick_on_rosenbrock() -> None:
    solution = gx.minimize(rosenbrock, jnp.asarray([-1.2, 1.0]), tol=1e-3)
    assert solution.status == gx.Status.converged
    assert solution.steps < 60
    assert solution.evaluations >= solution.steps + 1
    np.testing.assert_allclose(solution.params, 1.0, atol=1e-2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: gx.momentum(0.05),
        lambda: gx.rmsprop(0.01, momentum=0.9, nesterov=True),
        lambda: gx.coordinate_descent("random", seed=3),
        lambda: gx.polyak_average(gx.adam(gx.linear_decay(0.1, 0.01, 50)), decay=0.9),
        lambda: gx.sgd(jnp.asarray(0.05)),
        lambda: optax.chain(optax.clip(1.0), gx.nesterov(0.05)),
        lambda: optax.inject_hyperparams(gx.momentum)(learning_rate=0.05),
        lambda: optax.masked(gx.sgd(0.05), True),
        lambda: None,
    ],
)
def test_equally_configured_methods_compile_once(build: Any) -> None:
    traces = []

    def traced(x: jax.Array) -> jax.Array:
        traces.append(None)
        return bowl(x)

    first = gx.minimize(traced, jnp.zeros(2), build(), max_steps=20)
    count = len(traces)
    second = gx.minimize(traced, jnp.ones(2) / 2, build(), max_steps=30, tol=1e-5)
    assert count >= 1
    assert len(traces) == count
    assert first.value < bowl(jnp.zeros(2))
    assert second.value < bowl(jnp.ones(2) / 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (gx.momentum(0.05), gx.momentum(0.02)),
        (gx.momentum(0.05, 0.9), gx.momentum(0.05, 0.5)),
        (gx.rmsprop(0.05, momentum=0.9), gx.rmsprop(0.05, momentum=0.9, nesterov=True)),
        (gx.sgd(0.05), gx.adam(0.05)),
        (gx.sgd(gx.linear_decay(0.05, 0.01, 5)), gx.sgd(gx.linear_decay(0.05, 0.02, 5))),
        (gx.sgd(jnp.asarray(0.05)), gx.sgd(jnp.asarray(0.02))),
        (optax.sgd(0.05), optax.sgd(0.02)),
    ],
)
def test_other_configurations_are_told_apart(one: Any, other: Any) -> None:
    a = gx.minimize(bowl, jnp.zeros(2), one, max_steps=5)
    b = gx.minimize(bowl, jnp.zeros(2), other, max_steps=5)
    assert not np.allclose(a.params, b.params)


def test_one_trace_of_the_objective_in_a_solve() -> None:
    traces = []

    def traced(x: jax.Array) -> jax.Array:
        traces.append(None)
        return bowl(x)

    gx.minimize(traced, jnp.zeros(2), gx.adam(0.1), max_steps=5)
    assert len(traces) == 1


def test_jit_and_vmap_over_starts_and_hyperparameters() -> None:
    starts = jnp.asarray([[0.0, 0.0], [3.0, -1.0], [1.0, 1.0]])
    solve = lambda x: gx.minimize(bowl, x, gx.momentum(0.04), tol=1e-4)
    together = jax.jit(jax.vmap(solve))(starts)
    for i, start in enumerate(starts):
        alone = solve(start)
        np.testing.assert_allclose(together.params[i], alone.params, atol=1e-5)
        assert (together.steps[i], together.status[i]) == (alone.steps, alone.status)

    rates = jnp.asarray([0.01, 0.04, 0.3])
    swept = jax.vmap(lambda rate: gx.minimize(bowl, jnp.zeros(2), gx.sgd(rate), tol=1e-4))(rates)
    names = [gx.Status(int(status)).name for status in swept.status]
    assert names == ["converged", "converged", "non_finite"]
    assert swept.steps[1] < swept.steps[0]
    tols = jax.vmap(lambda tol: gx.minimize(bowl, jnp.zeros(2), gx.sgd(0.04), tol=tol).steps)(
        jnp.asarray([1e-1, 1e-3])
    )
    assert tols[0] < tols[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        start = jnp.zeros(2, dtype)
        solution = gx.minimize(bowl, start, gx.momentum(0.02), tol=0.1, max_steps=500)
        assert solution.params.dtype == dtype
        assert solution.value < 0.1


def test_python_floats_and_nested_parameters() -> None:
    solution = gx.minimize(
        lambda p: (p["a"] - 2) ** 2 + jnp.sum((p["b"][0] + 1) ** 2),
        {"a": 0.0, "b": [jnp.zeros((2, 2))]},
        gx.sgd(0.3),
    )
    assert solution.params["a"] == pytest.approx(2.0, abs=1e-5)
    np.testing.assert_allclose(solution.params["b"][0], -1.0, atol=1e-5)


def test_an_objective_that_cannot_be_hashed() -> None:
    class Loss:
        __hash__ = None

        def __call__(self, x: jax.Array) -> jax.Array:
            return bowl(x)

    assert gx.minimize(Loss(), jnp.zeros(2), gx.sgd(0.04)).status == gx.Status.converged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda x: x, jnp.zeros(2)), r"fn must return one real number.*shape \(2,\)"),
        ((lambda x: (jnp.sum(x), x), jnp.zeros(2)), r"fn must return one real number.*tuple"),
        ((lambda x: jnp.sum(x) * 1j, jnp.zeros(2)), r"fn must return one real number.*complex"),
        ((bowl, jnp.zeros(2, int)), r"params has dtype int32"),
        ((bowl, {"x": 3}), r"params\['x'\] has dtype int32"),
        ((bowl, jnp.zeros(2), "adam"), r"tx='adam'.*gx\.momentum"),
        ((bowl, jnp.zeros(2), gx.adam), r"tx=.*gx\.momentum"),
    ],
)
def test_bad_input_is_named(arguments: Any, message: str) -> None:
    fn, start, *tx = arguments
    with pytest.raises((TypeError, ValueError), match=message):
        gx.minimize(fn, start, *(tx or [gx.sgd(0.1)]))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tol": 0}, "tol must be positive"),
        ({"tol": -1.0}, "tol"),
        ({"tol": float("nan")}, "tol"),
        ({"max_steps": -1}, "max_steps"),
        ({"max_steps": "many"}, "max_steps"),
    ],
)
def test_bad_options_are_named(option: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        gx.minimize(bowl, jnp.zeros(2), gx.sgd(0.1), **option)


def test_prints_as_a_report() -> None:
    solution = gx.minimize(rosenbrock, jnp.asarray([-1.2, 1.0]), tol=1e-3)
    report = str(solution)
    assert report.startswith("converged")
    assert "1.00e-03" in report
    assert str(int(solution.evaluations)) in report
    batch = jax.vmap(lambda x: gx.minimize(bowl, x, gx.sgd(0.04), tol=1e-4))(jnp.ones((3, 2)))
    assert str(batch) == "3 solves: 3 converged"


def test_resumes_where_it_stopped() -> None:
    start = jnp.asarray([-1.2, 1.0])
    for tx in (gx.bfgs(), gx.adam(0.02)):
        whole = gx.minimize(rosenbrock, start, tx, max_steps=30)
        half = gx.minimize(rosenbrock, start, tx, max_steps=12)
        rest = gx.minimize(rosenbrock, start, tx, max_steps=30, resume=half)
        np.testing.assert_array_equal(rest.params, whole.params)
        assert (rest.steps, rest.status) == (whole.steps, whole.status)


def test_a_resumed_solve_that_has_ended_takes_no_step() -> None:
    start = jnp.asarray([-1.2, 1.0])
    for tx in (gx.bfgs(), gx.adam(0.02), gx.trust_region()):
        first = gx.minimize(rosenbrock, start, tx, max_steps=10)
        again = gx.minimize(rosenbrock, start, tx, max_steps=10, resume=first)
        assert (again.steps, again.evaluations) == (10, first.evaluations)
        assert again.status == gx.Status.max_steps
    done = gx.minimize(rosenbrock, start, gx.bfgs(), tol=1.0)
    again = gx.minimize(rosenbrock, start, gx.bfgs(), tol=1.0, resume=done)
    assert (again.evaluations, again.status) == (done.evaluations, gx.Status.converged)
    finer = gx.minimize(rosenbrock, start, gx.bfgs(), tol=1e-4, resume=done)
    assert finer.evaluations > done.evaluations


def test_progress_is_called_between_blocks() -> None:
    seen = []
    tx = gx.sgd(0.01)
    solution = gx.minimize(
        bowl, jnp.zeros(2), tx, max_steps=25, progress=seen.append, progress_every=10
    )
    assert [int(s.steps) for s in seen] == [10, 20, 25]
    assert np.all(np.diff([float(s.value) for s in seen]) < 0)
    plain = gx.minimize(bowl, jnp.zeros(2), tx, max_steps=25)
    np.testing.assert_array_equal(solution.params, plain.params)


def test_aux_of_the_best_point() -> None:
    fn = lambda x: (bowl(x), {"twice": 2 * x})
    solution = gx.minimize(fn, jnp.zeros(2), gx.momentum(0.04), has_aux=True, tol=1e-4)
    np.testing.assert_array_equal(solution.aux["twice"], 2 * solution.params)


def test_default_method_for_many_parameters() -> None:
    solution = gx.minimize(lambda x: jnp.sum((x - 1) ** 4 + (x - 1) ** 2), jnp.zeros(300), tol=1e-4)
    assert solution.status == gx.Status.converged


def usual_name(p: Any) -> jax.Array:
    return jnp.sum((p["w"] - 30) ** 2)


NAMES = [
    "stalled",
    "evaluations",
    "curvature_products",
    "non_finite",
    "num_linesearch_steps",
    "info",
]
SHAPES: list[tuple[int, ...]] = [(), (3,)]


@pytest.mark.parametrize(
    ("name", "shape"),
    [(n, s) for i, n in enumerate(NAMES) for s in every(2, SHAPES, i % 2)],
)
def test_a_parameter_may_have_the_name_of_a_diagnostic(name: str, shape: Any) -> None:
    tx = gx.momentum(0.1)
    fn = lambda p: jnp.sum((p[name] - 30) ** 2)
    solution = gx.minimize(fn, {name: jnp.zeros(shape)}, tx)
    usual = gx.minimize(usual_name, {"w": jnp.zeros(shape)}, tx)
    assert solution.status == usual.status == gx.Status.converged
    assert (solution.evaluations, solution.curvature_products) == (usual.evaluations, 0)
    np.testing.assert_array_equal(solution.params[name], usual.params["w"])


def penalty(g: Any, p: Any) -> Any:
    return jax.tree.map(lambda g, p: g + 0.5 * jnp.sign(p), g, p)


@pytest.mark.parametrize(
    ("link", "minimum"),
    [(optax.add_decayed_weights(1.0), 2 / 3), (optax.stateless(penalty), 0.75)],
    ids=["decay", "l1"],
)
def test_a_penalty_outside_the_objective_is_noticed(link: Any, minimum: float) -> None:
    """From where the path passes the objective's own minimum on the way to the penalised one."""
    fn = lambda x: jnp.sum((x - 1) ** 2)
    tx = optax.chain(link, gx.sgd(0.01))
    solution = gx.minimize(fn, 3 * jnp.ones(2), tx)
    np.testing.assert_allclose(solution.params, minimum, atol=1e-4)
    assert solution.status == gx.Status.converged
    best = gx.minimize(fn, 3 * jnp.ones(2), tx, returned="best")
    np.testing.assert_allclose(best.params, 1, atol=0.02)
    few = gx.minimize(fn, 3 * jnp.ones(2), tx, max_steps=120)
    np.testing.assert_allclose(few.value, fn(few.params), rtol=1e-5)
    assert few.value > best.value


def test_noise_is_no_penalty() -> None:
    tx = optax.chain(optax.add_noise(0.1, 0.5, key=0), gx.sgd(0.1))
    solution = gx.minimize(bowl, jnp.zeros(2), tx, max_steps=100)
    best = gx.minimize(bowl, jnp.zeros(2), tx, max_steps=100, returned="best")
    np.testing.assert_array_equal(solution.params, best.params)
    last = gx.minimize(bowl, jnp.zeros(2), tx, max_steps=100, returned="last")
    assert last.value > best.value


@pytest.mark.parametrize("partition", [optax.partition, gx.partition])
@pytest.mark.parametrize("build", [lambda: gx.sgd(0.1), lambda: gx.lbfgs(ravel=False)])
def test_frozen_parameters_do_not_keep_a_run_from_its_end(partition: Any, build: Any) -> None:
    fn = lambda p: jnp.sum((p["a"] - 1) ** 2) + jnp.sum((p["b"] - 2) ** 2)
    labels = {"a": "move", "b": "freeze"}
    tx = partition({"move": build(), "freeze": optax.set_to_zero()}, labels)
    solution = gx.minimize(fn, {"a": jnp.zeros(2), "b": jnp.zeros(2)}, tx)
    assert solution.status == gx.Status.converged
    assert solution.grad_norm <= 1e-6
    np.testing.assert_allclose(solution.params["a"], 1, atol=1e-5)
    np.testing.assert_array_equal(solution.params["b"], 0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: gx.accumulate(gx.sgd(0.4), 200),
        lambda: gx.sgd(lambda count: jnp.where(count < 150, 0, 0.1)),
    ],
    ids=["accumulate", "warm-up"],
)
def test_waiting_is_no_stall(build: Any) -> None:
    solution = gx.minimize(lambda x: (x - 3) ** 2, 0.0, build())
    assert solution.status == gx.Status.converged
    assert solution.params == pytest.approx(3, abs=1e-5)


def test_coordinate_descent_stalls_after_a_round_that_moves_nothing() -> None:
    """At a kink, where no coordinate descends, though the gradient is not zero."""
    kink = lambda x: jnp.sum(jnp.abs(x - jnp.asarray([1.0, 2.0])))
    for order, most in (("cyclic", 20), ("random", 200)):
        solution = gx.minimize(kink, jnp.zeros(2), gx.coordinate_descent(order))
        assert solution.status == gx.Status.stalled
        assert solution.steps < most


BUILDERS = [gx.bfgs, gx.nonlinear_cg, gx.trust_region, lambda: gx.sgd(0.1)]
UNITS = [1e-10, 1.0, 1e10]


@pytest.mark.parametrize(
    ("build", "unit"), [(b, u) for i, b in enumerate(BUILDERS) for u in every(2, UNITS, i % 2)]
)
def test_an_objective_unbounded_below_is_told_early(build: Any, unit: float) -> None:
    fn = lambda x: -unit * jnp.sum(x**2)
    start = jnp.asarray([1.0, 2.0])
    tx = build()
    if not jax.tree.leaves(tx.init(start))[0].ndim and unit != 1:
        tx = optax.chain(optax.scale(1 / unit), tx)  # a rate has a unit
    solution = gx.minimize(fn, start, tx, tol=1e-6 * unit)
    assert solution.status == gx.Status.unbounded
    assert solution.steps < 150
    assert solution.value < -1e6 * unit


def test_rounding_never_adds_up_to_a_climb() -> None:
    hill = lambda x: 1e6 - x**2
    solution = gx.minimize(hill, 10.0, optax.scale(0.001), tol=1e-2, max_steps=20_000)
    assert solution.value <= hill(10.0)
    assert solution.status != gx.Status.converged


def test_parameters_too_coarse_to_move_are_reported_as_stalled() -> None:
    start = jnp.asarray(100.0, jnp.bfloat16)
    solution = gx.minimize(lambda x: x**2, start, gx.sgd(1e-6), max_steps=5000)
    assert solution.status == gx.Status.stalled
    assert solution.steps < 200


SCALE = 0.05


def test_a_constant_that_a_schedule_reads_is_part_of_the_configuration() -> None:
    global SCALE
    build = lambda: gx.sgd(lambda count: SCALE)
    SCALE = 0.05
    first = gx.minimize(bowl, jnp.zeros(2), build(), max_steps=3)
    SCALE = 0.02
    second = gx.minimize(bowl, jnp.zeros(2), build(), max_steps=3)
    assert not np.allclose(first.params, second.params)


def test_a_frozen_dataclass_with_arrays_as_objective() -> None:
    @dataclasses.dataclass(frozen=True)
    class Loss:
        target: jax.Array

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sum((x - self.target) ** 2)

    solution = gx.minimize(Loss(jnp.ones(2)), jnp.zeros(2), gx.sgd(0.3))
    assert solution.status == gx.Status.converged


def test_a_list_of_numbers_is_no_vector() -> None:
    with pytest.raises(TypeError, match=r"list of 2 numbers: pass jnp\.asarray\(params\)"):
        gx.minimize(bowl, [1.0, 2.0], gx.bfgs())
