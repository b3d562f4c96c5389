"""The lecture's rows beside the library's methods, and how far apart their paths are.

``python -m tests.reference.rows`` prints the table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradxform as gx
from tests.reference import first_order as slides

STEPS = 300
rng = np.random.default_rng(7)
EXAMPLES, LABELS = rng.normal(size=(256, 5)), rng.integers(0, 3, size=256)
START = rng.normal(size=18)


def gradient(k: int, theta: np.ndarray) -> np.ndarray:
    """The gradient of softmax regression with a wavy penalty, on minibatch k of 32 examples."""
    batch = slice(32 * (k % 8), 32 * (k % 8) + 32)
    x, y = EXAMPLES[batch], LABELS[batch]
    logits = x @ theta[:15].reshape(5, 3) + theta[15:]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(32), y] -= 1
    return np.concatenate([(x.T @ p / 32).ravel(), p.mean(axis=0)]) + 0.1 * np.sin(3 * theta)


def unflatten(theta: np.ndarray) -> dict[str, jax.Array]:
    return {"w": jnp.asarray(theta[:15].reshape(5, 3)), "b": jnp.asarray(theta[15:])}


def flatten(params: Any) -> np.ndarray:
    return np.concatenate([np.ravel(params["w"]), np.ravel(params["b"])])


def path(tx: optax.GradientTransformation, start: np.ndarray, steps: int) -> list[np.ndarray]:
    """The parameters that a stock loop evaluates, after each update."""
    update = jax.jit(tx.update)
    params = unflatten(start)
    state, points = tx.init(params), []
    for k in range(steps):
        grads = unflatten(gradient(k, flatten(params)))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        points.append(flatten(gx.eval_params(state, params)))
    return points


def constant(rate: float) -> slides.Rate:
    return lambda k: rate


def decaying(rate: float) -> slides.Rate:
    return lambda k: rate * (1 / (1 + 0.05 * k))


class Row(NamedTuple):
    """A slide, the method that claims to be it, and the slide's loop."""

    slide: str
    method: Callable[[Any], optax.GradientTransformation]  # of the learning rate
    loop: Callable[..., list[np.ndarray]]
    constants: tuple[Any, ...]
    rate: float


ROWS = {
    "sgd": Row("SGD update", gx.sgd, slides.sgd, (), 0.5),
    "momentum": Row(
        "SGD with momentum", lambda e: gx.momentum(e, 0.9), slides.momentum, (0.9,), 0.1
    ),
    "nesterov": Row(
        "SGD with Nesterov momentum", lambda e: gx.nesterov(e, 0.9), slides.nesterov, (0.9,), 0.1
    ),
    "delta_bar_delta": Row(
        "Delta-bar-delta",
        lambda e: gx.delta_bar_delta(e, kappa=0.02, phi=0.2, theta=0.7),
        slides.delta_bar_delta,
        (0.02, 0.2, 0.7),
        0.1,
    ),
    "rprop": Row(
        "Resilient propagation (iRprop−)", gx.rprop, slides.rprop, (0.5, 1.2, 1e-6, 50.0), 0.1
    ),
    "adagrad": Row("AdaGrad", gx.adagrad, slides.adagrad, (1e-7,), 0.3),
    "rmsprop": Row("RMSProp", lambda e: gx.rmsprop(e, 0.9), slides.rmsprop, (0.9, 1e-6), 0.02),
    "rmsprop_momentum": Row(
        "RMSProp with momentum",
        lambda e: gx.rmsprop(e, 0.9, momentum=0.8),
        slides.rmsprop_momentum,
        (0.9, 1e-6, 0.8),
        0.01,
    ),
    "rmsprop_nesterov": Row(
        "RMSProp with Nesterov momentum",
        lambda e: gx.rmsprop(e, 0.9, eps=0.0, momentum=0.8, nesterov=True),
        slides.rmsprop_nesterov,
        (0.9, 0.0, 0.8),
        0.01,
    ),
    "rmsprop_nesterov_delta": Row(
        "RMSProp with Nesterov momentum, δ inside the root",
        lambda e: gx.rmsprop(e, 0.9, momentum=0.8, nesterov=True),
        slides.rmsprop_nesterov,
        (0.9, 1e-6, 0.8),
        0.01,
    ),
    "adadelta": Row("AdaDelta", gx.adadelta, slides.adadelta, (0.95, 1e-6), 1.0),
    "adam": Row("Adam, δ outside the root", gx.adam, slides.adam, (0.9, 0.999, 1e-8, False), 0.05),
    "adam_slide": Row(
        "Adam, δ inside the root (the slide)",
        lambda e: gx.adam(e, eps=0.0, eps_root=1e-8),
        slides.adam,
        (0.9, 0.999, 1e-8, True),
        0.05,
    ),
}


def largest_difference(row: Row, decay: bool = False) -> float:
    """The largest entry by which the path of θ differs from the slide's, at float64."""
    schedule = gx.inverse_time_decay(row.rate, 0.05) if decay else row.rate
    rate = decaying(row.rate) if decay else constant(row.rate)
    ours = path(row.method(schedule), START, STEPS)
    lecture = row.loop(gradient, START, STEPS, rate, *row.constants)
    return float(np.max(np.abs(np.array(ours) - np.array(lecture))))


def main() -> None:
    with jax.enable_x64(True):
        print(f"largest difference from the slide's path over {STEPS} updates, float64")
        for row in ROWS.values():
            print(f"{largest_difference(row):9.1e}  {row.slide}")


if __name__ == "__main__":
    main()
