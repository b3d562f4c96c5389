import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradxform import kernels, tree


def test_map_computes_in_float32_and_keeps_the_first_dtype() -> None:
    small = jnp.asarray(1e-3, jnp.bfloat16)
    one = jnp.asarray(1.0, jnp.bfloat16)
    total = tree.map(lambda a, x, y: a + x + y, jnp.zeros((), jnp.float32), one, small)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, 1 + np.float32(small), rtol=1e-7)


def test_max_abs() -> None:
    assert tree.max_abs({"a": jnp.asarray([-3.0, 2.0]), "b": jnp.zeros((0,))}) == 3.0
    assert tree.max_abs({}) == 0.0
    assert jnp.isinf(tree.max_abs([jnp.asarray([1.0]), jnp.asarray(jnp.nan)]))


def test_sqrt_and_divide_at_zero() -> None:
    assert jax.grad(lambda x: tree.sqrt(x * x))(0.0) == 0.0
    assert jax.grad(tree.sqrt)(4.0) == pytest.approx(0.25)
    assert jnp.isnan(tree.sqrt(jnp.asarray(jnp.nan)))
    np.testing.assert_array_equal(
        tree.divide(jnp.asarray([0.0, 1.0, 6.0]), jnp.asarray([0.0, 0.0, 3.0])), [0, 0, 2]
    )
    assert jnp.isnan(tree.divide(jnp.asarray(1.0), jnp.asarray(jnp.nan)))


def test_count_stops_at_the_largest_integer() -> None:
    largest = jnp.asarray(2**31 - 1, jnp.int32)
    assert tree.add_count(largest, 5) == largest
    assert tree.add_count(jnp.asarray(3, jnp.int32), 5) == 8


def test_copy_has_buffers_of_its_own() -> None:
    x = jnp.ones(3)
    assert tree.copy(x).unsafe_buffer_pointer() != x.unsafe_buffer_pointer()


@pytest.mark.parametrize("step", [0.5, -0.5, -0.93, -0.99, -1.0, -1 + 1e-5, 0.0, jnp.nan])
def test_next_square(step: float) -> None:
    """Where nearly all cancels, and all, it is of the vector itself."""
    r = {"a": np.random.default_rng(0).normal(size=1000).astype("f4"), "b": jnp.asarray([[3.0]])}
    change = jax.tree.map(lambda x: x + 1e-2 * jnp.sin(100 * x), r)
    new = jax.tree.map(lambda x, y: x + np.float32(step) * y, r, change)
    found = tree.next_square(r, jnp.float32(step), change, new)
    exact = sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(new))
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.parametrize("shape", [(81,), (9, 9), (2, 3), (4096,)])
@pytest.mark.parametrize("lanes", [1, 8, 64, 200])
def test_the_largest_entry_of_a_batch_loses_no_nan(shape: tuple[int, ...], lanes: int) -> None:
    """As the largest number of a batch does on a CPU."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(lanes, *shape)).astype(np.float32)
    bad = rng.random(lanes) < 0.5
    bad[0] = True
    x.reshape(lanes, -1)[bad, 1] = np.nan
    for f in (tree.max_abs, lambda x: kernels.max_abs(x, x)[1], lambda x: tree.max_abs({"a": x})):
        assert (np.isfinite(jax.jit(jax.vmap(f))(x)) == ~bad).all()
