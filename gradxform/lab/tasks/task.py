"""Tasks: a data set and a model as the pure functions that a training loop needs."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.lab.data.sets import Dataset, Split, hold_out
from gradxform.lab.experiment import registry
from gradxform.lab.tasks.losses import (
    ImageLoss,
    Losses,
    NumberLoss,
    kernels,
    of_characters,
    of_classes,
    of_numbers,
    of_pixels,
    penalty,
)
from gradxform.lab.tasks.models import Autoencoder, ModelError, Transformer, build
from gradxform.lab.tasks.nets import Net, of_entry, of_ours
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


def _same_batch(_: jax.Array, batch: Batch) -> Batch:
    return batch


class Task(NamedTuple):
    """A loss to minimise and its data. The functions are pure and can be jitted.

    Only the first four are needed. A task of your own is one too, see :func:`gradxform.lab.task`.
    """

    init: Callable[[jax.Array], PyTree]  #: key -> parameters
    model: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    """(params, x, key) -> outputs with dropout on; the loss is convex in the outputs"""
    loss: Callable[[PyTree, jax.Array, jax.Array, jax.Array], jax.Array]
    """(outputs, x, y, weight) -> weighted mean loss plus penalty"""
    train: Split | Examples
    test: Split | Examples | None = None
    validation: Split | Examples | None = None
    metrics: Callable[[PyTree, Batch], dict[str, jax.Array]] | None = None
    """(params, batch) -> weighted sums over the batch, without dropout and penalty: ``loss``, and
    others under names of their own, such as ``accuracy``; only the loss if not given"""
    roots: tuple[str, ...] = ()  #: metrics whose mean's square root is reported
    draw: Callable[[jax.Array, Batch], Batch] = _same_batch
    """(key, batch) -> a new sample of each example for an online stream: :func:`shift_images`; the
    batch itself if not given"""
    unit: str = "loss"  #: unit of ``loss``, in words
    name: str = "task"
    residuals: Callable[[PyTree, Batch, bool], jax.Array] | None = None
    """for a loss that is half a sum of squares: (params, batch, is_by_rows) -> what is squared.
    ``is_by_rows`` asks for a fast Jacobian"""

    def sums(self, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The metrics of a batch, as weighted sums."""
        if self.metrics is not None:
            return self.metrics(params, batch)
        total = jnp.sum(batch.weight)
        outputs = self.model(params, batch.x, jax.random.key(0))
        return {"loss": total * self.loss(outputs, batch.x, batch.y, batch.weight)}


def make_task(
    data: Dataset,
    model: str,
    *,
    model_options: Mapping[str, Any] | None = None,
    validation_split: float = 0.0,
    examples: int | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    loss: ImageLoss | NumberLoss = "squared",
    delta: float = 1.0,
    standardise: bool = False,
) -> Task:
    """Combines a model and a data set.

    Images stay bytes until the compiled program divides them by the data set's scale. For ``cnn``
    the program then standardises each channel with the mean and standard deviation of the training
    part.

    - The loss of a classifier is the cross-entropy in nats.
    - The loss of a regression is the squared error or Huber's loss, and ``rmse`` is the root of the
      mean squared error in units of the target. With ``standardise`` the loss is of the target in
      units of its standard deviation.
    - The loss of an autoencoder is summed over the pixels of an image. It is the squared error, or
      the cross-entropy with grey levels as probabilities. So that the loss is convex in the
      outputs, the sigmoid is part of the model for squared errors, and of the loss for
      cross-entropies.
    - The loss of a language model is the cross-entropy of the next character in nats. Its
      accuracy is how often the likeliest character is right. Both are means over the positions.

    Args:
      data: the data set; its targets are numbers if it has no classes.
      model: a name in :data:`gradxform.lab.tasks.models.MODELS`, or a registered one.
      model_options: options of the model.
      validation_split: the last fraction of the training part, held out; 0 for none.
      examples: use only the first so many examples of the training part; all if not given.
      l1: factor of the sum of the kernels' absolute values, added to the training loss. In a
        registered model, every array with two or more dimensions counts as a kernel.
      l2: factor of the sum of their squares, added to the training loss.
      loss: loss of an autoencoder or of a regression.
      delta: where Huber's loss turns linear.
      standardise: whether inputs, and the target of a regression, get the mean 0 and the standard
        deviation 1 in the training part.

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
    data, validation = _parts(data, validation_split, examples)
    parts = data.train, validation, data.test
    unit = 1.0
    if standardise:
        parts, unit = _standardised(parts, has_classes=bool(data.num_classes))
    train, validation, test = parts
    scale = data.scale  # so that the functions do not keep data alive
    mean, deviation = _channel_statistics(train.x, scale) if model == "cnn" else (0.0, 1.0)
    net, activation, losses, measured = _net_and_losses(
        data, model, model_options or {}, loss, delta, unit
    )

    def scaled(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) / scale

    def logits(params: PyTree, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return net.apply(params, (scaled(x) - mean) / deviation, key)

    def forward(params: PyTree, x: jax.Array, key: jax.Array) -> PyTree:
        outputs = activation(logits(params, x, key))
        return (outputs, net.kernels(params)) if l1 or l2 else outputs

    def mean_loss(outputs: PyTree, x: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
        outputs, kernels = outputs if l1 or l2 else (outputs, [])
        each = losses(outputs, scaled(x), y)["loss"]
        total = jnp.sum(weight)
        # a part of a batch, drawn for curvature, may contain only filling
        fit = jnp.sum(weight * each) / jnp.where(total > 0, total, 1)
        return fit + penalty(kernels, l1, l2) if l1 or l2 else fit

    def metrics(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        outputs = activation(logits(params, batch.x, None))
        each = losses(outputs, scaled(batch.x), batch.y)
        return {name: jnp.sum(batch.weight * values) for name, values in each.items()}

    jax.eval_shape(net.init, jax.random.key(0))  # raises now if the model does not fit the data
    is_image = train.x.dtype == np.uint8 and not data.alphabet
    return Task(
        name=f"{data.name}/{model}",
        init=net.init,
        model=forward,
        loss=mean_loss,
        metrics=metrics,
        roots=("rmse",),
        draw=shift_images if is_image else _same_batch,
        unit=measured,
        train=train,
        validation=validation,
        test=test,
    )


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
    return penalty(kernels(params), l1, l2)


def task_of(table: Any, data: Dataset) -> Task:
    """The task of a config's ``[task]`` and its data set; see :func:`make_task`."""
    keys = inspect.signature(make_task).parameters.keys() - {"model"}
    return make_task(data, table.model, **table.model_dump(include=keys, exclude_none=True))


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


def _parts(
    data: Dataset, validation_split: float, examples: int | None
) -> tuple[Dataset, Split | None]:
    """The data set with the examples to train on, and those to validate with."""
    train, validation = data.train, None
    if validation_split:
        train, validation = hold_out(data.train, validation_split)
    if examples is not None:
        if not 1 <= examples <= len(train.x):
            raise ModelError(f"examples={examples}: there are {len(train.x)} to train on")
        train = train._replace(x=train.x[:examples], y=train.y[:examples])
    return data._replace(train=train), validation


def _net_and_losses(
    data: Dataset, model: str, options: Mapping[str, Any], loss: str, delta: float, unit: float
) -> tuple[Net, Callable[[jax.Array], jax.Array], Losses, str]:
    """The net, the map from logits to outputs, the losses, and their unit."""
    shape = data.train.x.shape[1:]
    outputs = data.num_classes or math.prod(data.train.y.shape[1:])
    entry = registry.find("model", model)
    module = build(model, outputs, **options) if entry is None else None
    if entry is not None:
        net = of_entry(entry, shape, outputs, options)
    else:
        net = of_ours(cast(Any, module), shape)
    is_text = isinstance(module, Transformer)
    if is_text != bool(data.alphabet):
        needs = "text, like synthetic_text" if is_text else "images"
        raise ModelError(f"{model} does not fit {data.name}: it needs {needs}")
    choices = get_args(ImageLoss if isinstance(module, Autoencoder) else NumberLoss)
    if loss not in choices:
        raise ModelError(f"loss={loss!r}: expected one of {', '.join(choices)}")
    if isinstance(module, Autoencoder):
        return net, *of_pixels(cast(ImageLoss, loss))
    if not data.num_classes:
        words = "squared error" if loss == "squared" else "Huber's loss"
        return net, _same, of_numbers(cast(NumberLoss, loss), delta, unit), words
    return net, _same, of_characters if is_text else of_classes, "cross-entropy, nats"


def _standardised(
    parts: tuple[Split, Split | None, Split | None], has_classes: bool
) -> tuple[tuple[Split, Split | None, Split | None], float]:
    """The parts in units of the training part's deviations, and the deviation of the target."""
    train = parts[0]
    mean, deviation = _statistics(train.x)
    y_mean, y_deviation = (0.0, 1.0) if has_classes else _statistics(train.y.reshape(-1))

    def changed(part: Split) -> Split:
        y = part.y if has_classes else (part.y - y_mean) / y_deviation
        return Split(((part.x - mean) / deviation).astype(np.float32), y)

    validation, test = (None if part is None else changed(part) for part in parts[1:])
    return (changed(train), validation, test), float(y_deviation)


def _statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the examples; 1 where all are equal."""
    mean = x.mean(axis=0, dtype=np.float64)
    deviation = x.std(axis=0, dtype=np.float64)
    return mean, np.where(deviation > 1e-12 * np.abs(mean), deviation, 1.0)


def _same(logits: jax.Array) -> jax.Array:
    return logits


def _interpolation(size: int, shifts: jax.Array) -> jax.Array:
    """Matrices (n, size, size) that shift a line of pixels by linear interpolation."""
    pixels = jnp.arange(size, dtype=jnp.float32)
    sources = jnp.clip(pixels - shifts[:, None], 0, size - 1)
    return jnp.maximum(0, 1 - jnp.abs(sources[..., None] - pixels))


def _channel_statistics(x: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of the scaled images; 1 for a constant one."""
    pixels = x.reshape(-1, x.shape[-1] if x.ndim == 4 else 1)
    # Integer sums are exact. einsum converts in blocks, without a copy eight times as large.
    wide = np.int64 if pixels.dtype == np.uint8 else np.float64
    mean = pixels.sum(axis=0, dtype=wide) / len(pixels)
    square = np.einsum("nc,nc->c", pixels, pixels, dtype=wide) / len(pixels)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    deviation[deviation == 0] = scale
    shape = (-1,) if x.ndim == 4 else ()  # a scalar if there is no channel axis
    return tuple((s / scale).astype(np.float32).reshape(shape) for s in (mean, deviation))
