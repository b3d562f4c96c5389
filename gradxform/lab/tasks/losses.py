"""The losses of the lab's tasks: for each example its loss and its other metrics."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from gradxform.tree import PyTree

Losses = Callable[[jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]
"""(outputs, x, y) -> the metrics of each example; ``loss`` is one of them"""

ImageLoss = Literal["squared", "cross_entropy"]
NumberLoss = Literal["squared", "huber"]


def of_classes(logits: jax.Array, _: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Cross-entropy in nats, and accuracy."""
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    )
    correct = jnp.argmax(logits, axis=-1) == labels
    return {"loss": cross_entropy, "accuracy": correct.astype(jnp.float32)}


def of_characters(
    logits: jax.Array, numbers: jax.Array, following: jax.Array
) -> dict[str, jax.Array]:
    """Means over the positions of cross-entropy and accuracy."""
    each = of_classes(logits, numbers, following)
    return {name: jnp.mean(values, axis=1) for name, values in each.items()}


def of_pixels(loss: ImageLoss) -> tuple[Callable[[jax.Array], jax.Array], Losses, str]:
    """For an autoencoder: the map from logits to outputs, the losses, and their unit."""
    if loss == "cross_entropy":
        return lambda logits: logits, _cross_entropy_of_pixels, "cross-entropy per image, nats"

    def reconstruction(logits: jax.Array) -> jax.Array:
        return nn.sigmoid(logits.astype(jnp.float32))

    return reconstruction, _squares_of_pixels, "squared error per image"


def of_numbers(loss: NumberLoss, delta: float, unit: float) -> Losses:
    """Losses of a regression, and as ``rmse`` the squared error in units of the target.

    Args:
      loss: the squared error, or Huber's loss.
      delta: where Huber's loss turns linear.
      unit: one unit of the outputs, in units of the target.
    """

    def losses(outputs: jax.Array, _: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        errors = outputs.reshape(len(y), -1).astype(jnp.float32) - y.reshape(len(y), -1)
        squares = jnp.square(errors)
        each = squares if loss == "squared" else optax.losses.huber_loss(errors, delta=delta)
        return {"loss": jnp.sum(each, axis=1), "rmse": unit**2 * jnp.mean(squares, axis=1)}

    return losses


def penalty(kernels: Sequence[jax.Array], l1: float, l2: float) -> jax.Array:
    """``l1 Σ|w| + l2 Σw²``."""
    terms = [l1 * jnp.sum(jnp.abs(w)) + l2 * jnp.sum(jnp.square(w)) for w in kernels]
    return sum(terms, start=jnp.zeros((), jnp.float32))


def kernels(params: PyTree) -> list[jax.Array]:
    """The leaves of the name ``kernel``."""
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    return [leaf for path, leaf in named if jax.tree_util.keystr(path).endswith("['kernel']")]


def matrices(params: PyTree) -> list[jax.Array]:
    """The leaves with at least two dimensions: the weights of any net, without its biases."""
    return [leaf for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) >= 2]


def _squares_of_pixels(outputs: jax.Array, images: jax.Array, _: jax.Array) -> dict[str, jax.Array]:
    error = _sum_of_pixels(jnp.square(outputs - images))
    return {"loss": error, "error": error}


def _cross_entropy_of_pixels(
    logits: jax.Array, images: jax.Array, _: jax.Array
) -> dict[str, jax.Array]:
    logits = logits.astype(jnp.float32)
    cross_entropy = optax.sigmoid_binary_cross_entropy(logits, images)
    error = _sum_of_pixels(jnp.square(nn.sigmoid(logits) - images))
    return {"loss": _sum_of_pixels(cross_entropy), "error": error}


def _sum_of_pixels(each: jax.Array) -> jax.Array:
    return jnp.sum(each.reshape(len(each), -1), axis=-1)
