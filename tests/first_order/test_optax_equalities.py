"""Where Optax can express a method, the arguments that make it equal; else that it differs."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.reference.rows import START, flatten, gradient, unflatten

pytestmark = pytest.mark.usefixtures("x64")
STEPS = 100
schedule = gx.inverse_time_decay(0.1, 0.05)


def loop_path(tx: optax.GradientTransformation) -> np.ndarray:
    """The parameters in the loop (not those of ``eval_params``)."""
    update = jax.jit(tx.update)
    params = unflatten(START)
    state, points = tx.init(params), []
    for k in range(STEPS):
        updates, state = update(unflatten(gradient(k, flatten(params))), state, params)
        params = optax.apply_updates(params, updates)
        points.append(flatten(params))
    return np.array(points)


def difference(ours: optax.GradientTransformation, theirs: optax.GradientTransformation) -> Any:
    return np.max(np.abs(loop_path(ours) - loop_path(theirs)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    {
        "sgd": (gx.sgd(0.1), optax.sgd(0.1)),
        "sgd, scheduled": (gx.sgd(schedule), optax.sgd(schedule)),
        "momentum": (gx.momentum(0.1, 0.9), optax.sgd(0.1, momentum=0.9)),
        "momentum, scheduled": (
            gx.momentum(schedule, 0.9),
            optax.chain(optax.scale_by_learning_rate(schedule), optax.trace(0.9)),
        ),
        "nesterov": (gx.nesterov(0.1, 0.9), optax.sgd(0.1, momentum=0.9, nesterov=True)),
        "nesterov, scheduled": (
            gx.nesterov(schedule, 0.9),
            optax.chain(optax.scale_by_learning_rate(schedule), optax.trace(0.9, nesterov=True)),
        ),
        "adagrad without constants": (
            gx.adagrad(0.1, eps=0.0),
            optax.adagrad(0.1, initial_accumulator_value=0.0, eps=0.0),
        ),
        "rmsprop": (
            gx.rmsprop(0.01, 0.9, 1e-6),
            optax.rmsprop(0.01, decay=0.9, eps=1e-6, eps_in_sqrt=True),
        ),
        "rmsprop with momentum": (
            gx.rmsprop(0.01, 0.9, 1e-6, momentum=0.8),
            optax.rmsprop(0.01, decay=0.9, eps=1e-6, eps_in_sqrt=True, momentum=0.8),
        ),
        "adadelta": (gx.adadelta(), optax.adadelta(1.0, rho=0.95, eps=1e-6)),
        "adam": (gx.adam(0.05), optax.adam(0.05)),
        "adam, the slide": (
            gx.adam(0.05, eps=0.0, eps_root=1e-8),
            optax.adam(0.05, eps=0.0, eps_root=1e-8),
        ),
    }.values(),
    ids=lambda tx: "",
)
def test_equal(ours: optax.GradientTransformation, theirs: optax.GradientTransformation) -> None:
    assert difference(ours, theirs) < 1e-10


def test_rprop_makes_the_steps_that_optax_computes() -> None:
    """Optax 0.2.8 keeps each step in its state and returns it one update late."""
    ours, theirs = gx.rprop(0.1), optax.rprop(0.1)
    params = unflatten(START)
    state, their_state = ours.init(params), theirs.init(params)
    turned, largest = 0, 0.0
    for k in range(STEPS):
        grads = unflatten(gradient(k, flatten(params)))
        updates, state = ours.update(grads, state, params)
        _, their_state = theirs.update(grads, their_state, params)
        step = their_state[0].prev_updates
        largest = max(largest, np.max(np.abs(flatten(updates) + flatten(step))))
        turned += np.sum(flatten(updates) == 0)
        params = optax.apply_updates(params, updates)
    assert turned > 100
    assert largest < 1e-10


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gx.momentum(schedule, 0.9), optax.sgd(schedule, momentum=0.9)),
        (gx.nesterov(schedule, 0.9), optax.sgd(schedule, momentum=0.9, nesterov=True)),
        (gx.adagrad(0.1), optax.adagrad(0.1)),
        (gx.rmsprop(0.01, 0.9, 1e-2), optax.rmsprop(0.01, decay=0.9, eps=1e-2, eps_in_sqrt=False)),
    ],
    ids=["momentum, scheduled", "nesterov, scheduled", "adagrad", "rmsprop, δ outside"],
)
def test_different(
    ours: optax.GradientTransformation, theirs: optax.GradientTransformation
) -> None:
    assert difference(ours, theirs) > 1e-4


def test_nesterov_loop_holds_the_interim_point_and_optax_cannot_give_theta() -> None:
    ours = gx.nesterov(0.1, 0.9)
    params, state = unflatten(START), ours.init(unflatten(START))
    for k in range(10):
        updates, state = ours.update(unflatten(gradient(k, flatten(params))), state, params)
        params = optax.apply_updates(params, updates)
    theta = flatten(gx.eval_params(state, params))
    v = flatten(state.velocity)
    np.testing.assert_allclose(flatten(params), theta + 0.9 * v, rtol=0, atol=1e-12)
    assert np.max(np.abs(flatten(params) - theta)) > 1e-3


def test_linear_schedule() -> None:
    ours, theirs = gx.linear_decay(0.3, 0.01, 40), optax.linear_schedule(0.3, 0.01, 40)
    for count in (0, 1, 17, 39, 40, 41, 1000):
        np.testing.assert_allclose(ours(count), theirs(count), rtol=1e-12)


def test_regularisation_by_composition() -> None:
    """L2 is decayed weights before the method, L1 their sign; both equal the penalised gradient."""
    l1, l2 = 0.01, 0.1
    sign = optax.stateless(lambda g, p: jax.tree.map(lambda g, p: g + l1 * jax.numpy.sign(p), g, p))
    composed = optax.chain(optax.add_decayed_weights(l2), sign, gx.momentum(0.1, 0.9))
    params, state = unflatten(START), composed.init(unflatten(START))
    theta, v = START, np.zeros_like(START)
    for k in range(50):
        updates, state = composed.update(unflatten(gradient(k, flatten(params))), state, params)
        params = optax.apply_updates(params, updates)
        g = gradient(k, theta) + l2 * theta + l1 * np.sign(theta)
        v = 0.9 * v - 0.1 * g
        theta = theta + v
    np.testing.assert_allclose(flatten(params), theta, rtol=0, atol=1e-10)
