import functools

import jax
import jax.numpy as jnp
import pytest

import gradxform as gx
from gradxform.objective import bind, check_value


def test_bind_hands_on_what_value_fn_names() -> None:
    f = lambda p, x, y=1.0: p + x * y
    assert bind(f, {"x": 2.0, "z": 9.0})(jnp.asarray(1.0)) == 3.0
    assert bind(f, {"x": 2.0, "y": 3.0})(jnp.asarray(1.0)) == 7.0


def test_bind_hands_everything_but_its_own_words_to_keywords() -> None:
    f = lambda p, **data: p + data["x"] + len(data)
    assert bind(f, {"x": 2.0, "value": 0.0, "grad": 0.0})(jnp.asarray(1.0)) == 4.0


def test_bind_takes_partial_and_jitted_functions() -> None:
    f = jax.jit(lambda p, x: p * x)
    assert bind(functools.partial(f, x=2.0), {})(jnp.asarray(3.0)) == 6.0
    assert bind(f, {"x": 2.0})(jnp.asarray(3.0)) == 6.0


@pytest.mark.parametrize("value", [jnp.ones(2), jnp.asarray(1), jnp.asarray(1j), {"loss": 1.0}])
def test_a_value_must_be_one_real_number(value: object) -> None:
    with pytest.raises(ValueError, match="value_fn must return one real number, got"):
        check_value("value_fn", value)  # pyright: ignore[reportArgumentType]


def test_compose_refuses_what_it_cannot_use() -> None:
    with pytest.raises(TypeError, match=r"compose\(model=3\): expected a function"):
        gx.compose(jnp.sum, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"compose\(chunks=0\)"):
        gx.compose(jnp.sum, jnp.sin, chunks=0)
    with pytest.raises(TypeError, match=r"compose\(chunks=2\.0\).*integer"):
        gx.compose(jnp.sum, jnp.sin, chunks=2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"compose\(z=…\): neither loss nor model"):
        gx.compose(lambda out, y: out - y, lambda p, x: p * x, z=jnp.ones(2))
    model = lambda p, x: p * x
    with pytest.raises(ValueError, match=r"chunks=3.*divide.*\['x'\] has shape \(4,\)"):
        gx.compose(jnp.mean, model, chunks=3, x=jnp.ones(4))(1.0)
    with pytest.raises(ValueError, match="no data to cut"):
        gx.compose(jnp.mean, jnp.sin, chunks=2)(1.0)


def test_data_that_are_missing_or_without_a_name_are_named() -> None:
    objective = gx.compose(lambda outputs, y: jnp.mean((outputs - y) ** 2), lambda w, x: x @ w)
    w, x, y = jnp.ones(3), jnp.ones((2, 3)), jnp.ones(2)
    assert objective(w, x=x, y=y) == 4
    with pytest.raises(TypeError, match="the loss needs y=…"):
        objective(w, x=x)
    with pytest.raises(TypeError, match="the model needs x=…"):
        objective(w, y=y)
    with pytest.raises(TypeError, match="takes its data by name"):
        objective(w, x, y)
