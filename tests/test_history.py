"""The history of a run, and calls of ``progress`` from inside it."""

import functools
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.thinning import every

START = jnp.asarray([-1.2, 1.0])


def rosenbrock(x: jax.Array) -> jax.Array:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def accepted_points(tx: Any, updates: int) -> list[tuple[float, float, int]]:
    """Value, largest gradient entry and evaluations of the accepted points, by an own loop."""
    tx, params = optax.with_extra_args_support(tx), START
    state, points, count = tx.init(params), [], 0

    @jax.jit
    def turn(params: jax.Array, state: Any) -> Any:
        value, grads = jax.value_and_grad(rosenbrock)(params)
        return (
            value,
            grads,
            tx.update(grads, state, params, value=value, grad=grads, value_fn=rosenbrock),
        )

    for k in range(updates):
        value, grads, (updated, state) = turn(params, state)
        infos = getattr(state, "info", None)
        accepted = int(infos.accepted) if infos is not None else k + 1
        if accepted > count:
            points.append((float(value), float(jnp.max(jnp.abs(grads))), k + 1))
        count = accepted
        params = optax.apply_updates(params, updated)
    return points


@pytest.mark.parametrize("tx", every(2, [gx.bfgs(), gx.trust_region(), gx.sgd(1e-3)]))
def test_it_holds_the_accepted_points(tx: Any) -> None:
    points = np.asarray(accepted_points(tx, 30))
    solution = gx.minimize(rosenbrock, START, tx, max_steps=29, history=100)
    history = solution.history
    assert history is not None
    count = int(history.count)
    assert count in (len(points), len(points) + 1)  # a trial point may be the one returned
    got = np.stack([history.value, history.grad_norm, history.evaluations], axis=1)
    np.testing.assert_allclose(got[: len(points)], points, rtol=1e-3, atol=1e-5)
    assert (got[count:] == got[count - 1]).all()


def test_the_last_entries_are_kept_and_no_evaluation_is_added() -> None:
    plain = gx.minimize(rosenbrock, START)
    assert plain.history is None
    long, short = (gx.minimize(rosenbrock, START, history=n).history for n in (100, 7))
    assert long is not None
    assert short is not None
    count = int(long.count)
    np.testing.assert_array_equal(short.value, long.value[count - 7 : count])
    np.testing.assert_array_equal(short.evaluations, long.evaluations[count - 7 : count])
    assert long.evaluations[count - 1] == plain.evaluations
    assert long.value[count - 1] == plain.value


def test_it_goes_on_in_a_resumed_run_and_in_lanes() -> None:
    whole = gx.minimize(rosenbrock, START, history=60).history
    half = gx.minimize(rosenbrock, START, max_steps=20, history=60)
    rest = gx.minimize(rosenbrock, START, resume=half, history=60).history
    jax.tree.map(np.testing.assert_array_equal, rest, whole)
    starts = jnp.stack([START, jnp.zeros(2), 2 * START])
    lanes = jax.jit(jax.vmap(lambda x: gx.minimize(rosenbrock, x, history=60)))(starts).history
    assert lanes is not None
    assert whole is not None
    assert lanes.count[0] == whole.count
    np.testing.assert_allclose(lanes.evaluations[0], whole.evaluations)


def test_a_resumed_run_may_ask_for_more() -> None:
    half = gx.minimize(rosenbrock, START, max_steps=20)
    rule = gx.small_change(1e-3, of="params") | gx.small_gradient(1e-3)
    rest = gx.minimize(rosenbrock, START, resume=half, history=5, stop=rule)
    assert rest.converged
    assert rest.history is not None
    assert rest.history.evaluations[0] > 20
    again = gx.minimize(rosenbrock, START, resume=rest, history=9)
    assert again.converged
    assert again.history is not None
    assert again.history.value.shape == (9,)
    with_aux = lambda x, n: (rosenbrock(x), jnp.zeros(n))
    first = gx.minimize(with_aux, START, args=(3,), has_aux=True, max_steps=5)
    with pytest.raises(ValueError, match=r"^minimize\(resume=…\): the second part .* shape"):
        gx.minimize(with_aux, START, args=(4,), has_aux=True, resume=first)
    with pytest.raises(ValueError, match=r"^minimize\(resume=…\): .* a call without aux"):
        gx.minimize(with_aux, START, args=(3,), has_aux=True, aux=jnp.zeros(3), resume=first)


def test_progress_may_stop_a_run_and_loses_nothing() -> None:
    seen = []

    def progress(solution: gx.Solution) -> bool:
        seen.append(solution)
        return bool(solution.value < 1.0)

    solution = gx.minimize(rosenbrock, START, progress=progress, progress_every=5)
    assert gx.Status(int(solution.status)).name == "stopped"
    assert solution.value < 1.0
    assert solution.value == seen[-1].value
    rest = gx.minimize(rosenbrock, START, resume=solution)
    plain = gx.minimize(rosenbrock, START)
    np.testing.assert_array_equal(rest.params, plain.params)
    assert rest.evaluations == plain.evaluations


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, lambda f: jax.jit(jax.vmap(f))])
def test_progress_sees_all_lanes_in_one_call(transform: Any) -> None:
    seen: list[gx.Solution] = []
    starts = jnp.stack([START, jnp.zeros(2), 2 * START])
    is_batch = transform is not jax.jit
    x = starts if is_batch else START
    solve = lambda x: gx.minimize(rosenbrock, x, progress=seen.append, progress_every=10)
    solution = jax.block_until_ready(transform(solve)(x))
    plain = transform(lambda x: gx.minimize(rosenbrock, x))(x)
    np.testing.assert_array_equal(solution.params, plain.params)
    np.testing.assert_array_equal(solution.evaluations, plain.evaluations)
    jax.effects_barrier()
    steps = [int(np.max(s.steps)) for s in seen]
    assert steps == [*range(10, int(np.max(plain.steps)), 10), int(np.max(plain.steps))]
    assert np.shape(seen[0].value) == ((3,) if is_batch else ())
    np.testing.assert_array_equal(seen[-1].status, plain.status)


def test_progress_is_called_whatever_is_traced() -> None:
    """Also if only what the objective closes over is traced, or nothing at all."""
    seen: list[gx.Solution] = []
    fit = lambda shift: gx.minimize(
        lambda x: jnp.sum((x - shift) ** 2), START, progress=seen.append
    )
    for solve in (jax.jit(fit), lambda shift: jax.jit(lambda: fit(1.0))()):
        solution = jax.block_until_ready(solve(1.0))
        jax.effects_barrier()
        assert seen.pop().steps == solution.steps


def test_progress_stops_all_lanes() -> None:
    starts = jnp.stack([START, jnp.ones(2), 2 * START])
    solve = jax.vmap(
        lambda x: gx.minimize(rosenbrock, x, progress=lambda s: True, progress_every=10)
    )
    solution = solve(starts)
    names = [gx.Status(int(s)).name for s in solution.status]
    assert names == ["stopped", "converged", "stopped"]
    assert solution.steps.tolist() == [10, 0, 10]


def test_the_bar_counts_lanes() -> None:
    out = io.StringIO()
    bar = gx.progress_bar(8, out)
    starts = jnp.stack([START, jnp.ones(2), 2 * START])
    jax.block_until_ready(
        jax.vmap(lambda x: gx.minimize(rosenbrock, x, progress=bar, progress_every=20))(starts)
    )
    jax.effects_barrier()
    lines = out.getvalue().split("\r")
    assert "1 of 3 solves ended" in lines[1]
    assert "3 of 3 solves ended\n" in lines[-1]


# -- running statistics


def normalised(w: jax.Array, running: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
    """A net with batch normalisation: the statistics do not change the training loss."""
    z = x @ w
    mean = z.mean()
    loss = jnp.mean((jnp.tanh(z - mean) - y) ** 2)
    return loss, 0.9 * running + 0.1 * jax.lax.stop_gradient(mean)


def first_of(fn: Any, w: jax.Array) -> jax.Array:
    return fn(w)[0]


@pytest.mark.parametrize("tx", [gx.bfgs(), gx.sgd(0.1)], ids=["bfgs", "sgd"])
def test_running_statistics_follow_the_accepted_points(tx: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (20, 2)) + 1
    y = jnp.tanh(x @ jnp.asarray([0.5, -0.3]) - 0.2)
    start = jnp.asarray([1.0, 1.0])
    options: Any = {"args": (x, y), "has_aux": True, "aux": 0.0, "max_steps": 12}
    solution = gx.minimize(normalised, start, tx, returned="last", **options)

    tx, params, running = optax.with_extra_args_support(tx), start, jnp.asarray(0.0)
    state, evaluated = tx.init(params), running
    for k in range(13):
        value_fn = lambda w, running=running: normalised(w, running, x, y)
        (value, aux), grads = jax.value_and_grad(value_fn, has_aux=True)(params)
        evaluated = aux
        before = getattr(getattr(state, "info", None), "accepted", -1)
        updates, state = tx.update(
            grads,
            state,
            params,
            value=value,
            grad=grads,
            value_fn=functools.partial(first_of, value_fn),
        )
        if getattr(getattr(state, "info", None), "accepted", k) > before:
            running = aux
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(solution.aux, evaluated, rtol=1e-5)


def test_aux_keeps_its_dtypes() -> None:
    kinds = (jnp.int32, jnp.bool, jnp.bfloat16, jnp.float32, jnp.complex64)
    fn = lambda x: (jnp.sum((x - 1) ** 2), [jnp.ones((2,), kind) for kind in kinds])
    solution = gx.minimize(fn, jnp.zeros(2), has_aux=True)
    assert [x.dtype for x in solution.aux] == list(kinds)
    assert all((x == 1).all() for x in solution.aux)


def test_aux_costs_no_call_at_the_end() -> None:
    calls = []

    def fn(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda: calls.append(None))
        return jnp.sum((x - 1) ** 2), 2 * x

    solution = gx.minimize(fn, jnp.zeros(2), gx.momentum(0.04), has_aux=True, tol=1e-3)
    jax.effects_barrier()
    assert len(calls) == solution.evaluations
    np.testing.assert_array_equal(solution.aux, 2 * solution.params)
    with pytest.raises(ValueError, match=r"^minimize\(aux=0.0\): pass has_aux=True too"):
        gx.minimize(lambda x: jnp.sum(x**2), jnp.zeros(2), aux=0.0)
