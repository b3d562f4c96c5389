import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx


def test_nesterov_without_delta_survives_a_parameter_without_gradient() -> None:
    tx = gx.rmsprop(0.1, eps=0.0, momentum=0.5, nesterov=True)
    g = jnp.asarray([0.0, 2.0])
    updates, _ = tx.update(g, tx.init(g), g)
    assert updates[0] == 0
    np.testing.assert_allclose(updates[1], -1.5 * 0.1 / np.sqrt(0.1), rtol=1e-6)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match=r"nesterov=True.*needs momentum"):
        gx.rmsprop(0.1, nesterov=True)
