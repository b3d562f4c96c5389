"""Arguments of an objective: what is traced, what is compiled in, and what is refused."""

import gc
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx

pytestmark = pytest.mark.usefixtures("few_objects")
T = jnp.linspace(0.0, 1.0, 8)
START = jnp.zeros(2)


def line(p: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((p[0] + p[1] * t - y) ** 2)


class Traced:
    """Counts how often an objective is traced."""

    def __init__(self) -> None:
        self.count = 0

    def counted(self) -> None:
        self.count += 1


@pytest.mark.parametrize("tx", [gx.bfgs(), gx.adam(0.1), gx.trust_region()], ids="bat")
def test_new_data_of_the_same_shape_never_compile_again(tx: Any) -> None:
    traced = Traced()

    def fn(p: jax.Array, t: jax.Array, y: jax.Array, weight: float) -> jax.Array:
        traced.counted()
        return weight * line(p, t, y)

    counts = []
    for k in range(4):
        data = (T, np.asarray(k + 2.0 * T), 1.0 + k)
        solution = gx.minimize(fn, START, tx, args=data, tol=1e-3, max_steps=300)
        counts.append(traced.count)
        np.testing.assert_allclose(solution.params, [k, 2], atol=0.05)
    # a counter outside is read by the objective, so that its change is seen once
    assert counts[1] == counts[2] == counts[3]


def test_by_name_and_by_position_are_the_same() -> None:
    y = 1 - 3 * T
    plain = gx.minimize(lambda p: line(p, T, y), START, tol=1e-3)
    for args in ((T, y), [T, y], {"t": T, "y": y}, {"y": y, "t": T}):
        solution = gx.minimize(line, START, args=args, tol=1e-3)
        np.testing.assert_allclose(solution.params, plain.params, atol=1e-6)


def test_composed_objectives_take_data_by_name_and_keep_their_parts() -> None:
    squares = lambda outputs, y: jnp.mean((outputs - y) ** 2)
    model = lambda p, t: p[0] + p[1] * t
    tx = gx.trust_region(curvature=gx.gauss_newton())
    objective = gx.compose(squares, model)
    solution = gx.minimize(objective, START, tx, args={"t": T, "y": 4 + T}, tol=1e-3)
    np.testing.assert_allclose(solution.params, [4, 1], atol=1e-2)
    with pytest.raises(TypeError, match=r"takes its data by name: pass a dictionary"):
        gx.minimize(objective, START, tx, args=(T, 4 + T))
    with pytest.raises(TypeError, match=r"neither loss nor model .* has an argument z"):
        gx.minimize(objective, START, tx, args={"t": T, "y": T, "z": T})


def test_a_batch_of_data_sets_in_one_program() -> None:
    slopes = jnp.arange(1.0, 6.0)
    data = slopes[:, None] * T
    fit = jax.jit(jax.vmap(lambda y: gx.minimize(line, START, args=(T, y), tol=1e-3)))
    solutions = fit(data)
    np.testing.assert_allclose(solutions.params[:, 1], slopes, atol=1e-2)
    assert (solutions.status == gx.Status.converged).all()


def test_what_steers_python_is_compiled_in() -> None:
    def fn(p: jax.Array, power: int, kind: str, options: dict[str, Any]) -> jax.Array:
        total = sum(p**k for k in range(2, power))
        return jnp.sum(total if kind == "sum" else p**4) + options["shift"]

    for power, kind, value in ((3, "sum", 0.0), (5, "sum", 0.0), (5, "last", 0.0)):
        args = (power, kind, {"shift": jnp.asarray(0.5)})
        solution = gx.minimize(fn, jnp.full(2, 0.4), args=args, tol=1e-3)
        np.testing.assert_allclose(solution.value, 0.5 + value, atol=1e-3)


def test_no_program_keeps_the_data_alive() -> None:
    y = jnp.sin(T)
    gx.minimize(line, START, args=(T, y), tol=1e-3)
    lost = weakref.ref(y)
    del y
    gc.collect()
    assert lost() is None


def test_derivatives_forward_through_the_data() -> None:
    slope = lambda c: gx.minimize(line, START, args=(T, c * T), tol=1e-6).params[1]
    np.testing.assert_allclose(jax.jvp(slope, (2.0,), (1.0,))[1], 1.0, atol=1e-2)


def test_resume_and_progress_take_the_data_again() -> None:
    y, tx, seen = 1 + T, gx.adam(0.05), []
    whole = gx.minimize(line, START, tx, args=(T, y), max_steps=20)
    half = gx.minimize(line, START, tx, args=(T, y), max_steps=8)
    rest = gx.minimize(line, START, tx, args=(T, y), max_steps=20, resume=half)
    np.testing.assert_array_equal(rest.params, whole.params)
    options = {"progress": seen.append, "progress_every": 10}
    again = gx.minimize(line, START, tx, args=(T, y), max_steps=20, **options)
    np.testing.assert_array_equal(again.params, whole.params)
    assert [int(s.steps) for s in seen] == [10, 20]


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(TypeError, match=r"minimize\(args=\(.*fn\(p, t, y\) does not take") as one:
        gx.minimize(lambda p, t, y: line(p, t, y), START, args=(T,))
    with pytest.raises(TypeError, match=r"missing a required argument: 'y'"):
        gx.minimize(lambda p, t, y: line(p, t, y), START, args={"t": T, "z": T})
    assert "\n" not in str(one.value)
    with pytest.raises(TypeError, match=r"minimize\(args="):
        gx.minimize(line, START, args=T)


# -- objectives that are pytrees themselves

TRACES: list[None] = []


def model(p: jax.Array, t: jax.Array) -> jax.Array:
    TRACES.append(None)
    return p[0] + p[1] * t


def squares(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((outputs - y) ** 2)


def misfit(p: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    return squares(model(p, t), y)


class Misfit(eqx.Module):
    """An objective with data of its own."""

    t: jax.Array
    y: jax.Array
    power: int = 2

    def __call__(self, p: jax.Array) -> jax.Array:
        return jnp.mean(jnp.abs(model(p, self.t) - self.y) ** self.power)


BUILDS = {
    "Partial": lambda y: jax.tree_util.Partial(misfit, t=T, y=y),
    "compose": lambda y: gx.compose(squares, model, t=T, y=y),
    "Equinox": lambda y: Misfit(T, y),
}


@pytest.mark.parametrize("name", BUILDS)
def test_arrays_of_a_callable_pytree_are_traced_and_freed(name: str) -> None:
    traces, found = [], []
    for k in range(4):
        y = k + 2.0 * T
        fn = BUILDS[name](y)
        solution = gx.minimize(fn, START, gx.momentum(0.3), tol=1e-3)
        traces.append(len(TRACES))
        found.append(np.asarray(solution.params))
        kept = weakref.ref(y)
        del fn, y, solution
        gc.collect()
        assert kept() is None
    assert traces[0] == traces[3]
    np.testing.assert_allclose(np.stack(found), [[k, 2] for k in range(4)], atol=0.05)


def test_what_is_no_array_in_a_callable_pytree_is_compiled_in() -> None:
    squared, quartic = (gx.minimize(Misfit(T, 1 + T**2, n), START, tol=1e-3) for n in (2, 4))
    assert np.abs(squared.params - quartic.params).max() > 1e-3
