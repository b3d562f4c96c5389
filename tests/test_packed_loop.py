"""The loop whose scalars travel together does what the plain loop does."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import gradxform as gx
from gradxform.packed_loop import alternate


class Carry(NamedTuple):
    """A scalar of every kind that a state may hold, and some arrays."""

    x: jax.Array
    total: Any
    tiny: Any
    half: Any
    count: Any
    small: Any
    even: Any
    key: Any
    nothing: None
    empty: jax.Array


def first(x: jax.Array) -> Carry:
    return Carry(
        x=x,
        total=jnp.zeros((), x.dtype),
        tiny=jnp.asarray(1e-40, jnp.float32),
        half=jnp.asarray(0.5, jnp.bfloat16),
        count=jnp.int32(2**30),
        small=jnp.int8(-3),
        even=jnp.asarray(True),
        key=jax.random.key(0),
        nothing=None,
        empty=jnp.zeros((0, 2)),
    )


def solve(x: jax.Array, scale: Any = 1.0, *, branch: bool = False, steps: int = 5) -> Carry:
    def look(carry: Carry) -> tuple[Carry, jax.Array]:
        total = carry.total + scale * jnp.sum(carry.x)
        return carry._replace(total=total, even=~carry.even), jnp.sin(carry.x)

    def move(carry: Carry, seen: jax.Array) -> Carry:
        key, _ = jax.random.split(carry.key)
        count = carry.count + goes_on(carry).astype(jnp.int32)
        return carry._replace(x=carry.x + scale * seen, count=count, key=key, half=-carry.half)

    def goes_on(carry: Carry) -> jax.Array:
        return (carry.count < 2**30 + steps) & (carry.total < 1e6)

    return alternate(look, move, goes_on, first(x), branch=branch)


def by_hand(x: jax.Array, scale: float = 1.0, steps: int = 5) -> tuple[jax.Array, jax.Array]:
    total = jnp.zeros((), x.dtype)
    for _ in range(steps):
        total = total + scale * jnp.sum(x)
        x = x + scale * jnp.sin(x)
    return x, total


X = jnp.asarray([0.1, -0.2, 0.3])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_keeps_every_scalar(jit: bool, branch: bool) -> None:
    run = lambda x: solve(x, branch=branch)
    carry = (jax.jit(run) if jit else run)(X)
    x, total = by_hand(X)
    np.testing.assert_allclose(carry.total, total, rtol=1e-6)
    assert carry.count == 2**30 + 5
    assert carry.tiny == jnp.asarray(1e-40, jnp.float32)
    assert not carry.even
    assert carry.small == -3
    np.testing.assert_allclose(carry.x, x, rtol=1e-6)
    for old, new in zip(jax.tree.leaves(first(X)), jax.tree.leaves(carry), strict=True):
        assert jax.typeof(old) == jax.typeof(new)


@pytest.mark.usefixtures("x64")
def test_in_64_bits() -> None:
    x = jnp.asarray([0.1, -0.2, 0.3], jnp.float64)
    np.testing.assert_allclose(jax.jit(solve)(x).total, by_hand(x)[1], rtol=1e-14)


@pytest.mark.parametrize("branch", [False, True])
def test_lanes_end_by_themselves(branch: bool) -> None:
    scales = jnp.asarray([0.5, 1.0])
    lanes = jax.jit(jax.vmap(lambda s: solve(X, s, branch=branch)))(scales)
    for i, scale in enumerate(scales):
        alone = solve(X, scale, branch=branch)
        np.testing.assert_allclose(lanes.total[i], alone.total, rtol=1e-6)
        np.testing.assert_allclose(lanes.x[i], alone.x, rtol=1e-6)


def test_inside_a_named_axis() -> None:
    summed = lambda x: solve(x, jax.lax.psum(1.0, "lane")).total
    np.testing.assert_allclose(
        jax.vmap(summed, axis_name="lane")(jnp.stack([X, X])), 2 * [by_hand(X, 2.0)[1]], rtol=1e-6
    )


def test_derivatives_in_forward_mode() -> None:
    f = lambda scale: solve(X, scale).total
    found = jax.jit(jax.jacfwd(f))(0.3)
    np.testing.assert_allclose(found, jax.grad(lambda s: by_hand(X, s)[1])(0.3), rtol=1e-5)
    lanes = jax.vmap(jax.jacfwd(f))(jnp.asarray([0.3, 0.3]))
    np.testing.assert_allclose(lanes, [found, found], rtol=1e-5)


def test_inside_shard_map() -> None:
    mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("device")
    own = lambda x: gx.minimize(lambda y: jnp.sum((y - 2 * x) ** 2), x, gx.sgd(0.25)).params
    found = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=rows, out_specs=rows))(
        jnp.asarray([[1.0], [2.0]])
    )
    np.testing.assert_allclose(found, [[2.0], [4.0]], rtol=1e-5)


def test_effects_are_seen_once_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    """A thrown away update would print once more."""
    inner = gx.sgd(0.25)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        jax.debug.print("update")
        return inner.update(grads, state, params, **extra)

    tx = type(inner)(inner.init, update)
    solution = gx.minimize(lambda x: x**2, jnp.asarray(1.0), tx, tol=1e-3)
    jax.effects_barrier()
    # and twice before the first, where minimize looks whether the method adds a penalty
    assert capsys.readouterr().out.count("update") == solution.steps + 2


def test_resume_makes_the_steps_of_one_run() -> None:
    """The cheap method's last update waits in the loop, the dear one's is not made."""
    bowl = lambda x: jnp.sum(jnp.asarray([1.0, 30.0]) * (x - 1) ** 2)
    for tx in (gx.momentum(0.01), gx.newton(0.5), gx.lbfgs()):
        whole = gx.minimize(bowl, jnp.zeros(2), tx, tol=1e-12, max_steps=7)
        part = gx.minimize(bowl, jnp.zeros(2), tx, tol=1e-12, max_steps=3)
        assert part.steps == 3
        rest = gx.minimize(bowl, jnp.zeros(2), tx, tol=1e-12, max_steps=7, resume=part)
        assert rest.steps == whole.steps
        np.testing.assert_array_equal(rest.params, whole.params)
