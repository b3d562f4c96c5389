"""Tasks: a data set and a model as the pure functions that a training loop needs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from gradxform.lab.data.sets import Dataset, Split, hold_out
from gradxform.lab.tasks.models import Autoencoder, ModelError, Transformer, build
from gradxform.objective import Composed, compose
from gradxform.squares import sum_of_squares
from gradxform.tree import PyTree

__all__ = [
    "Batch",
    "Examples",
    "ModelError",
    "Task",
    "kernel_penalty",
    "make_task",
    "objective",
    "shift_images",
]


ImageLoss = Literal["squared", "cross_entropy"]


class Batch(NamedTuple):
    """Examples as they are stored, each with a weight."""

    x: jax.Array  #: uint8 (n, *image); for text (n, length)
    y: jax.Array  #: int32 (n,); for text (n, length)
    weight: jax.Array  #: float32 (n,), 0 for an example that only fills the batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examples:
    """A part of a data set on its devices, see :func:`gradxform.lab.training.epoch.to_device`."""

    x: jax.Array  #: uint8 (n, *image), n ≥ size; for text (n, length)
    y: jax.Array  #: int32 (n,); for text (n, length)
    size: int = dataclasses.field(metadata={"static": True})  #: real examples; the rest fills up


class Task(NamedTuple):
    """A loss to minimise and its data. The functions are pure and can be jitted."""

    name: str
    init: Callable[[jax.Array], PyTree]  #: key -> parameters, float32
    model: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    """(params, x, key) -> outputs with dropout on; the loss is convex in the outputs"""
    loss: Callable[[PyTree, jax.Array, jax.Array, jax.Array], jax.Array]
    """(outputs, x, y, weight) -> weighted mean loss plus penalty"""
    metrics: Callable[[PyTree, Batch], dict[str, jax.Array]]
    """(params, batch) -> weighted sums over the batch, without dropout and penalty: ``loss``, and
    ``accuracy`` or, for an autoencoder, ``error``, the squared error summed over the pixels, or,
    for an equation, ``relative_error``, the squared relative error"""
    draw: Callable[[jax.Array, Batch], Batch]
    """(key, batch) -> a new sample of each example for an online stream: :func:`shift_images`; for
    text the batch itself"""
    unit: str  #: unit of ``loss``, in words
    train: Split | Examples
    validation: Split | Examples | None
    test: Split | Examples
    residuals: Callable[[PyTree, Batch, bool], jax.Array] | None = None
    """for a loss that is half a sum of squares: (params, batch, is_by_rows) -> what is squared.
    ``is_by_rows`` asks for a fast Jacobian"""


def make_task(
    data: Dataset,
    model: str,
    *,
    model_options: Mapping[str, Any] | None = None,
    validation_split: float = 0.0,
    examples: int | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    loss: ImageLoss = "squared",
) -> Task:
    """Combines a model and a data set.

    Images stay bytes until the compiled program divides them by the data set's scale. For ``cnn``
    the program then standardises each channel with the mean and standard deviation of the training
    part.

    - The loss of a classifier is the cross-entropy in nats.
    - The loss of an autoencoder is summed over the pixels of an image. It is the squared error, or
      the cross-entropy with grey levels as probabilities. So that the loss is convex in the
      outputs, the sigmoid is part of the model for squared errors, and of the loss for
      cross-entropies.
    - The loss of a language model is the cross-entropy of the next character in nats. Its
      accuracy is how often the likeliest character is right. Both are means over the positions.

    Args:
      data: the data set.
      model: a name in :data:`gradxform.lab.tasks.models.MODELS`.
      model_options: options of the model.
      validation_split: the last fraction of the training part, held out; 0 for none.
      examples: use only the first so many examples of the training part; all if not given.
      l1: factor of the sum of the kernels' absolute values, added to the training loss.
      l2: factor of the sum of their squares, added to the training loss.
      loss: loss of an autoencoder.

    Raises:
      ModelError: the model or an option is unknown, the model does not fit the data, or a factor is
        negative.
      DataError: the validation split is out of range.

    >>> from gradxform.lab.data.sets import load
    >>> task = make_task(load("digits"), "logistic")
    >>> batch = Batch(jnp.array(task.train.x[:3]), jnp.array(task.train.y[:3]), jnp.ones(3))
    >>> value_fn = objective(task, batch, jax.random.key(1))
    >>> round(float(value_fn(task.init(jax.random.key(0)))), 4)  # all equally likely: log 10
    2.3026
    """
    for name, value in (("l1", l1), ("l2", l2)):
        if not value >= 0:
            raise ModelError(f"{name}={value}: expected a factor of at least 0")
    if loss not in get_args(ImageLoss):
        raise ModelError(f"loss={loss!r}: expected one of {', '.join(get_args(ImageLoss))}")
    module = build(model, data.num_classes, **(model_options or {}))
    is_text = isinstance(module, Transformer)
    if is_text != bool(data.alphabet):
        needs = "text, like synthetic_text" if is_text else "images"
        raise ModelError(f"{model} does not fit {data.name}: it needs {needs}")
    train, validation = data.train, None
    if validation_split:
        train, validation = hold_out(data.train, validation_split)
    if examples is not None:
        if not 1 <= examples <= len(train.x):
            raise ModelError(f"examples={examples}: there are {len(train.x)} to train on")
        train = train._replace(x=train.x[:examples], y=train.y[:examples])
    shape, scale = train.x.shape[1:], data.scale  # so that the functions do not keep data alive
    mean, deviation = _channel_statistics(train.x, scale) if model == "cnn" else (0.0, 1.0)

    def scaled(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) / scale

    def init(key: jax.Array) -> PyTree:
        return module.init(key, jnp.zeros((1, *shape), jnp.float32), train=False)["params"]

    def logits(params: PyTree, x: jax.Array, **options: Any) -> jax.Array:
        inputs = (scaled(x) - mean) / deviation
        return cast(jax.Array, module.apply({"params": params}, inputs, **options))

    activation, losses, unit = _output_and_losses(module, loss)

    def forward(params: PyTree, x: jax.Array, key: jax.Array) -> PyTree:
        outputs = activation(logits(params, x, train=True, rngs={"dropout": key}))
        return (outputs, _kernels(params)) if l1 or l2 else outputs

    def mean_loss(outputs: PyTree, x: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
        outputs, kernels = outputs if l1 or l2 else (outputs, [])
        each = losses(outputs, scaled(x), y)["loss"]
        total = jnp.sum(weight)
        # a part of a batch, drawn for curvature, may contain only filling
        fit = jnp.sum(weight * each) / jnp.where(total > 0, total, 1)
        return fit + _penalty(kernels, l1, l2) if l1 or l2 else fit

    def metrics(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        outputs = activation(logits(params, batch.x, train=False))
        each = losses(outputs, scaled(batch.x), batch.y)
        return {name: jnp.sum(batch.weight * values) for name, values in each.items()}

    jax.eval_shape(init, jax.random.key(0))  # raises now if the model does not fit the data
    return Task(
        f"{data.name}/{model}",
        init,
        forward,
        mean_loss,
        metrics,
        _unchanged if is_text else shift_images,
        unit,
        train,
        validation,
        data.test,
    )


def task_of(table: Any, data: Dataset) -> Task:
    """The task of a config's ``[task]`` and its data set; see :func:`make_task`."""
    options = table.model_dump(exclude={"kind", "dataset", "model"})
    return make_task(data, table.model, **options)


def objective(task: Task, batch: Batch, key: jax.Array, *, for_curvature: bool = False) -> Composed:
    """The objective on a batch: the task's loss of its model, with the data bound.

    The data are bound by name, so a method can evaluate curvature on a part of the batch.

    Args:
      task: model and loss.
      batch: the examples.
      key: random key of the dropout.
      for_curvature: whether only curvature is computed from it, so that a task of residuals can
        make their Jacobian fast.

    Returns:
      The ``value_fn``, see :func:`gradxform.compose`.
    """

    residuals = task.residuals
    if residuals is not None:
        return sum_of_squares(lambda params: residuals(params, batch, for_curvature))

    def model(params: PyTree, x: jax.Array) -> PyTree:
        return task.model(params, x, key)

    return compose(task.loss, model, x=batch.x, y=batch.y, weight=batch.weight)


def kernel_penalty(params: PyTree, l1: float, l2: float) -> jax.Array:
    """L1 and L2 regularisation: ``l1 Σ|w| + l2 Σw²`` over the kernels, without biases.

    You can add it to any loss, as :func:`make_task` does. The gradient of the L2 term is
    ``2 l2 w``: as in Keras, it has no factor of one half.

    Args:
      params: a parameter tree of nested dicts; the penalty covers the leaves named ``kernel``.
      l1: factor of the absolute values.
      l2: factor of the squares.

    >>> kernel_penalty({"kernel": jnp.array([1.0, -2.0]), "bias": jnp.ones(3)}, l1=0.5, l2=0.25)
    Array(2.75, dtype=float32)
    """
    return _penalty(_kernels(params), l1, l2)


def _kernels(params: PyTree) -> list[jax.Array]:
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    return [leaf for path, leaf in named if jax.tree_util.keystr(path).endswith("['kernel']")]


def _penalty(kernels: Sequence[jax.Array], l1: float, l2: float) -> jax.Array:
    terms = [l1 * jnp.sum(jnp.abs(w)) + l2 * jnp.sum(jnp.square(w)) for w in kernels]
    return sum(terms, start=jnp.zeros((), jnp.float32))


def shift_images(key: jax.Array, batch: Batch, extent: float = 1 / 14) -> Batch:
    """Makes a new sample of each image by a small random shift, which may be a fraction of a pixel.

    The vertical and horizontal shifts are independent and uniform. Pixels that enter at a border
    repeat the border. Pixels between the stored ones are interpolated bilinearly.

    Args:
      key: the random key.
      batch: images of shape (n, height, width) or (n, height, width, channels).
      extent: the largest shift as a fraction of the height and width; 1/14 is 2 pixels in 28.
    """
    height, width = batch.x.shape[1:3]
    limits = extent * jnp.array([height, width])
    shifts = limits * jax.random.uniform(key, (len(batch.x), 2), minval=-1.0, maxval=1.0)
    images = batch.x.reshape(*batch.x.shape[:3], -1).astype(jnp.float32)
    moved = jnp.einsum(
        "nij,njkc,nlk->nilc",
        _interpolation(height, shifts[:, 0]),
        images,
        _interpolation(width, shifts[:, 1]),
        precision=jax.lax.Precision.HIGHEST,
    )
    return batch._replace(x=jnp.round(moved).astype(batch.x.dtype).reshape(batch.x.shape))


def _unchanged(_: jax.Array, batch: Batch) -> Batch:
    return batch


def _interpolation(size: int, shifts: jax.Array) -> jax.Array:
    """Matrices (n, size, size) that shift a line of pixels by linear interpolation."""
    pixels = jnp.arange(size, dtype=jnp.float32)
    sources = jnp.clip(pixels - shifts[:, None], 0, size - 1)
    return jnp.maximum(0, 1 - jnp.abs(sources[..., None] - pixels))


_Losses = Callable[[jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]


def _output_and_losses(
    module: nn.Module, loss: ImageLoss
) -> tuple[Callable[[jax.Array], jax.Array], _Losses, str]:
    """The map from logits to outputs, the losses, and their unit."""
    if isinstance(module, Transformer):
        return lambda logits: logits, _character_losses, "cross-entropy, nats"
    if not isinstance(module, Autoencoder):
        return lambda logits: logits, _class_losses, "cross-entropy, nats"
    if loss == "cross_entropy":
        return lambda logits: logits, _pixel_losses, "cross-entropy per image, nats"

    def reconstruction(logits: jax.Array) -> jax.Array:
        return nn.sigmoid(logits.astype(jnp.float32))

    return reconstruction, _squared_losses, "squared error per image"


def _class_losses(logits: jax.Array, _: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    )
    correct = jnp.argmax(logits, axis=-1) == labels
    return {"loss": cross_entropy, "accuracy": correct.astype(jnp.float32)}


def _character_losses(
    logits: jax.Array, numbers: jax.Array, following: jax.Array
) -> dict[str, jax.Array]:
    each = _class_losses(logits, numbers, following)
    return {name: jnp.mean(values, axis=1) for name, values in each.items()}


def _squared_losses(outputs: jax.Array, images: jax.Array, _: jax.Array) -> dict[str, jax.Array]:
    error = _sum_of_pixels(jnp.square(outputs - images))
    return {"loss": error, "error": error}


def _pixel_losses(logits: jax.Array, images: jax.Array, _: jax.Array) -> dict[str, jax.Array]:
    logits = logits.astype(jnp.float32)
    cross_entropy = optax.sigmoid_binary_cross_entropy(logits, images)
    error = _sum_of_pixels(jnp.square(nn.sigmoid(logits) - images))
    return {"loss": _sum_of_pixels(cross_entropy), "error": error}


def _sum_of_pixels(each: jax.Array) -> jax.Array:
    return jnp.sum(each.reshape(len(each), -1), axis=-1)


def _channel_statistics(x: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of the scaled images; 1 for a constant one."""
    pixels = x.reshape(-1, x.shape[-1] if x.ndim == 4 else 1)
    # Integer sums are exact. einsum converts in blocks, without a copy eight times as large.
    mean = pixels.sum(axis=0, dtype=np.int64) / len(pixels)
    square = np.einsum("nc,nc->c", pixels, pixels, dtype=np.int64) / len(pixels)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    deviation[deviation == 0] = scale
    shape = (-1,) if x.ndim == 4 else ()  # a scalar if there is no channel axis
    return tuple((s / scale).astype(np.float32).reshape(shape) for s in (mean, deviation))
