"""The lab's models as Flax linen modules. They map images or text to logits.

The parameters are a plain dict. A module takes float inputs of shape (n, *image), or for text the
numbers of characters of shape (n, length). Its argument ``train`` turns dropout on.
"""

import dataclasses
import difflib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import glorot_uniform, zeros_init


class ModelError(ValueError):
    """A model does not exist, has wrong options, or does not fit the data."""


class Logistic(nn.Module):
    """Logistic regression: one linear layer. It starts at zero, because its loss is convex."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(self.num_classes, kernel_init=zeros_init())(_flat(x))


class KerasMLP(nn.Module):
    """The lecture's Keras example: one sigmoid layer of 32 units, then the classes.

    Kernels start Glorot-uniform and biases start at zero, as by default in Keras.

    Attributes:
      hidden: units of the sigmoid layer.

    References:
      Lecture 7, the Keras example; Glorot & Bengio (2010), equation 16.
    """

    num_classes: int
    hidden: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.sigmoid(nn.Dense(self.hidden, kernel_init=glorot_uniform())(_flat(x)))
        return nn.Dense(self.num_classes, kernel_init=glorot_uniform())(x)


class MLP(nn.Module):
    """The multilayer net of the Adam paper's figure 2: two layers of 1,000 rectified units.

    The paper states neither the dropout rates nor the initialisation. We use the usual rates of
    Srivastava et al. (2014), and Glorot-uniform kernels with zero biases.

    Attributes:
      hidden: units of each hidden layer.
      input_dropout: the probability with which an input is dropped in training.
      dropout: the same for a hidden unit.

    References:
      Kingma & Ba, "Adam" (2015), section 6.2.
    """

    num_classes: int
    hidden: tuple[int, ...] = (1000, 1000)
    input_dropout: float = 0.2
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(self.input_dropout, deterministic=not train)(_flat(x))
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, kernel_init=glorot_uniform())(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=glorot_uniform())(x)


class CNN(nn.Module):
    """The net of the Adam paper's figure 3, c64-c64-c128-1000.

    Three stages of a 5 x 5 convolution, rectified, and a 3 x 3 max pool of stride 2; then one layer
    of 1,000 rectified units; dropout on the input and on that layer. The paper does not state the
    dropout rates, the initialisation or what happens at the borders: ours are as in :class:`MLP`,
    with zero padding that keeps the size (a pool halves it, rounding up).

    Attributes:
      channels: channels of each stage.
      hidden: units of the fully connected layer.
      input_dropout: the probability with which an input is dropped in training.
      dropout: the same for a unit of the fully connected layer.

    Raises:
      ModelError: the images are too small for the pools.

    References:
      Kingma & Ba, "Adam" (2015), section 6.3.
    """

    num_classes: int
    channels: tuple[int, ...] = (64, 64, 128)
    hidden: int = 1000
    input_dropout: float = 0.2
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if x.ndim not in (3, 4):
            raise ModelError(f"cnn: needs images, found inputs of shape {x.shape[1:]}")
        if x.ndim == 3:
            x = x[..., None]
        smallest = 2 ** len(self.channels) + 1  # here the last pool still has a full window
        if min(x.shape[1:3]) < smallest:
            raise ModelError(
                f"cnn: images of {x.shape[1]} x {x.shape[2]} are too small for "
                f"{len(self.channels)} pools of stride 2: at least {smallest} x {smallest} are "
                "needed; choose another model or data set, or fewer channels"
            )
        x = nn.Dropout(self.input_dropout, deterministic=not train)(x)
        for channels in self.channels:
            convolve = _by_matrices if jax.default_backend() == "cpu" else None
            conv = nn.Conv(
                channels, (5, 5), kernel_init=glorot_uniform(), conv_general_dilated=convolve
            )
            x = nn.relu(conv(x))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = nn.relu(nn.Dense(self.hidden, kernel_init=glorot_uniform())(_flat(x)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=glorot_uniform())(x)


class Autoencoder(nn.Module):
    """A deep autoencoder: sigmoid layers down to a linear code, then the mirror image.

    The outputs are the logits of the pixels; their sigmoid is the reconstruction. The kernels start
    sparse (:func:`sparse_normal`), as in the first work that trained such nets from a random start.

    Attributes:
      widths: units of each layer from the input down to the code.

    References:
      Hinton & Salakhutdinov, "Reducing the dimensionality of data with neural networks" (2006), for
      the net; Martens, "Deep learning via Hessian-free optimization" (2010), for the start.
    """

    widths: tuple[int, ...] = (1000, 500, 250, 30)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        *encoder, code = self.widths
        pixels = math.prod(x.shape[1:])
        shape = x.shape
        x = _flat(x)
        for width in encoder:
            x = nn.sigmoid(nn.Dense(width, kernel_init=sparse_normal)(x))
        x = nn.Dense(code, kernel_init=sparse_normal)(x)
        for width in reversed(encoder):
            x = nn.sigmoid(nn.Dense(width, kernel_init=sparse_normal)(x))
        return nn.Dense(pixels, kernel_init=sparse_normal)(x).reshape(shape)


class Transformer(nn.Module):
    """A small decoder-only transformer: characters in, logits of each next character out.

    It embeds characters and adds learned positions. Each block has causal self-attention and a
    perceptron that is four times as wide, with tanh-GELU. Both have a layer norm in front and a
    residual connection. A last layer norm and a linear head with its own weights follow. There is
    no dropout. Initial values are the defaults of Flax: normal kernels and embeddings with variance
    1/inputs and 1/width.

    Every kernel is a matrix, for methods that treat matrices differently. The gradient can be
    differentiated in forward mode.

    Attributes:
      width: length of the vector of a character, a multiple of ``heads``.
      layers: number of blocks.
      heads: attention heads per block.

    Raises:
      ModelError: ``heads`` does not divide ``width``.

    References:
      Vaswani et al., "Attention is all you need" (2017); Radford et al., "Language models are
      unsupervised multitask learners" (2019), for the norm before each part; Hendrycks & Gimpel,
      "Gaussian error linear units" (2016), for the tanh.
    """

    num_classes: int
    width: int = 64
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.width % self.heads:
            raise ModelError(
                f"transformer: width={self.width} is no multiple of heads={self.heads}"
            )
        start = nn.initializers.normal(self.width**-0.5)
        positions = self.param("positions", start, (x.shape[1], self.width))
        h = nn.Embed(self.num_classes, self.width)(x.astype(jnp.int32)) + positions
        for _ in range(self.layers):
            q, k, v = jnp.split(nn.Dense(3 * self.width)(nn.LayerNorm()(h)), 3, axis=-1)
            h += nn.Dense(self.width)(_attention(q, k, v, self.heads))
            inner = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h)), approximate=True)
            h += nn.Dense(self.width)(inner)
        return nn.Dense(self.num_classes)(nn.LayerNorm()(h))


MODELS: dict[str, type[nn.Module]] = {
    "linear": Logistic,
    "logistic": Logistic,
    "keras_mlp": KerasMLP,
    "mlp": MLP,
    "cnn": CNN,
    "autoencoder": Autoencoder,
    "transformer": Transformer,
}


def build(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A model by name.

    Args:
      name: one of :data:`MODELS`.
      num_classes: number of logits; the autoencoder ignores it.
      **options: attributes of the model's class. Widths are integers of at least 1, or lists of
        them for several layers; dropout rates are in [0, 1).

    Raises:
      ModelError: the model or an option is unknown, or a value is out of range.

    >>> build("keras_mlp", num_classes=10, hidden=64).hidden
    64
    """
    if name not in MODELS:
        raise ModelError(f"no model is named {name!r}{_hint(name, MODELS)}")
    fields = dataclasses.fields(MODELS[name])
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    defaults = {key: value for key, value in defaults.items() if key not in ("parent", "name")}
    for option in options:
        if option not in defaults:
            raise ModelError(f"{name} has no option {option!r}{_hint(option, defaults)}")
    checked = {key: _check(f"{name}.{key}", options[key], defaults[key]) for key in options}
    if any(field.name == "num_classes" for field in fields):
        checked["num_classes"] = num_classes
    return MODELS[name](**checked)


def sparse_normal(
    key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32, connections: int = 15
) -> jax.Array:
    """Martens's sparse start: each unit has 15 inputs with standard normal weights.

    So the total input of a unit has the same size for every width of the layer below.

    Args:
      key: the random key.
      shape: (inputs, units).
      dtype: dtype of the kernel.
      connections: nonzero weights per unit; a unit with fewer inputs uses all of them.

    References:
      Martens, "Deep learning via Hessian-free optimization" (2010), section 5.

    >>> kernel = sparse_normal(jax.random.key(0), (100, 3))
    >>> jnp.count_nonzero(kernel, axis=0)
    Array([15, 15, 15], dtype=int32)
    """
    choice, values = jax.random.split(key)
    ranks = jnp.broadcast_to(jnp.arange(shape[0])[:, None], shape)
    chosen = jax.random.permutation(choice, ranks, axis=0, independent=True) < connections
    return jnp.where(chosen, jax.random.normal(values, shape, dtype), 0)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _by_matrices(x: jax.Array, kernel: jax.Array, *ignored: Any, **options: Any) -> jax.Array:
    """A convolution with stride 1 and same-size padding, as one matrix product per kernel row.

    On CPUs XLA makes the gradient of its own convolution ten times slower inside a loop, and an
    epoch is a loop (jax issue 12868).
    """
    rows, columns, _, outputs = kernel.shape
    around = [((n - 1) // 2, n // 2) for n in (rows, columns)]
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), *around, (0, 0)))
    x = jnp.concatenate([x[:, :, j : j + width] for j in range(columns)], axis=-1)
    products = (x[:, i : i + height] @ kernel[i].reshape(-1, outputs) for i in range(rows))
    return functools.reduce(jnp.add, products)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """For each position, the mean of the values up to it, weighted by the softmax of q·k/√d."""

    def apart(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], heads, -1)

    q, k, values = map(apart, (q, k, v))
    scores = jnp.einsum("nihd,njhd->nhij", q, k) * q.shape[-1] ** -0.5
    past = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = nn.softmax(jnp.where(past, scores, -jnp.inf))
    return jnp.einsum("nhij,njhd->nihd", weights, values).reshape(v.shape)


def _hint(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    listed = f"; there are {', '.join(known)}" if known else "; it has none"
    return listed + (f"; did you mean {near[0]}?" if near else "")


def _check(name: str, value: Any, default: Any) -> Any:
    """The value of an option, checked against the kind of its default: widths, width or rate."""

    def is_width(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    if isinstance(default, tuple):
        if isinstance(value, list | tuple) and value and all(map(is_width, value)):
            return tuple(value)
        raise ModelError(f"{name}={value!r}: expected a list of integers of at least 1")
    if isinstance(default, int):
        if is_width(value):
            return value
        raise ModelError(f"{name}={value!r}: expected an integer of at least 1")
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise ModelError(f"{name}={value!r}: expected a rate of at least 0 and below 1")
