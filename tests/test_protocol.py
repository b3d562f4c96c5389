import functools

import jax
import jax.numpy as jnp
import pytest

from gradxform import protocol


def test_bind_hands_on_what_value_fn_names() -> None:
    f = lambda p, x, y=1.0: p + x * y
    assert protocol.bind(f, {"x": 2.0, "z": 9.0})(jnp.asarray(1.0)) == 3.0
    assert protocol.bind(f, {"x": 2.0, "y": 3.0})(jnp.asarray(1.0)) == 7.0


def test_bind_hands_everything_but_its_own_words_to_keywords() -> None:
    f = lambda p, **data: p + data["x"] + len(data)
    assert protocol.bind(f, {"x": 2.0, "value": 0.0, "grad": 0.0})(jnp.asarray(1.0)) == 4.0


def test_bind_takes_partial_and_jitted_functions() -> None:
    f = jax.jit(lambda p, x: p * x)
    assert protocol.bind(functools.partial(f, x=2.0), {})(jnp.asarray(3.0)) == 6.0
    assert protocol.bind(f, {"x": 2.0})(jnp.asarray(3.0)) == 6.0


@pytest.mark.parametrize("value", [jnp.ones(2), jnp.asarray(1), jnp.asarray(1j), {"loss": 1.0}])
def test_a_value_must_be_one_real_number(value: object) -> None:
    with pytest.raises(ValueError, match="value_fn must return one real number, got"):
        protocol.check_value("value_fn", value)  # pyright: ignore[reportArgumentType]
