"""The objective: a function that remembers its parts, and the data bound to one."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.hyperparameters import Size, checked, shown

ValueFn: TypeAlias = Callable[..., jax.Array]


@checked
def compose(
    loss: Callable[..., jax.typing.ArrayLike],
    model: Callable[..., tree.PyTree],
    /,
    *,
    chunks: Size = 1,
    recompute: bool = True,
    **data: Any,
) -> "Composed":
    r"""A ``value_fn`` that remembers its parts: :math:`J(\theta) = L(f(\theta))`.

    It is called like any function of the parameters, and :func:`gradxform.gauss_newton` finds the
    loss and the model in it. Data given here, or later to ``update`` by keyword, reach the
    arguments of that name of either part: ``gx.compose(loss, model, x=x, y=y)`` is
    ``loss(model(params, x=x), y=y)``. The model can be anything that takes the parameters first: a
    plain function, ``module.apply`` of Flax linen, ``lambda params, x:
    equinox.combine(params, static)(x)``, or ``gx.nnx_value_fn(module, lambda module, x:
    module(x))`` for Flax NNX.

    With ``chunks=m`` the data are cut along the leading axis of all their arrays into m chunks of
    equal size, which are done one after the other,

    .. math::
        J(\theta) = \frac{1}{m} \sum_{i=1}^{m} L(f(\theta, x_i), y_i)

    the same value, gradient and curvature products to rounding, if the loss is a mean over
    examples, and if no example enters the outputs of another. The sums are in at least float32.

    Args:
      loss: of the outputs, and of data, to one real number.
      model: of the parameters, and of data, to the outputs: any pytree of floating-point arrays.
      chunks: m ≥ 1, a divisor of the leading axis of the data.
      recompute: whether a gradient or product goes through each chunk anew, so that memory is
        that of one chunk, at the price of one more pass through the model; False keeps what all
        the chunks have computed.
      **data: arrays, or pytrees of them.

    Returns:
      The function, with attributes ``loss`` and ``model``.

    Raises:
      TypeError: a part is no function or takes data by position alone, or ``chunks`` is no
        integer.
      ValueError: ``chunks`` is not positive, or does not divide the data; data that neither part
        takes.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> x, y = jnp.asarray([1.0, 2.0, 3.0, 4.0]), jnp.asarray([2.0, 4.0, 6.0, 8.0])
    >>> squares = lambda outputs, y: jnp.mean((outputs - y) ** 2)
    >>> value_fn = gx.compose(squares, lambda w, x: w * x, chunks=2, x=x, y=y)
    >>> float(value_fn(1.0)), float(gx.gauss_newton()(value_fn, 1.0)(1.0))
    (7.5, 15.0)
    """
    for name in data:
        if not any(name in data_of(part, data) for part in (loss, model)):
            raise ValueError(f"compose({name}=…): neither loss nor model has an argument {name}")
    return Composed(loss, model, data, chunks, recompute)


@dataclasses.dataclass(frozen=True, eq=False)
class Composed:
    """What :func:`compose` returns."""

    loss: Callable[..., jax.typing.ArrayLike]  #: L, of the outputs and of data
    model: Callable[..., tree.PyTree]  #: f, of the parameters and of data
    data: Mapping[str, Any]  #: what is bound already, by name
    chunks: int = 1
    recompute: bool = True

    def __call__(self, params: tree.PyTree, **data: Any) -> jax.Array:
        whole = dataclasses.replace(self, data={**self.data, **data})
        if self.chunks > 1 and self.recompute:
            handed = _summed_in_float32(params)
            return whole.mean_over_chunks(lambda chunk: chunk(handed()))
        loss, model = whole.parts()
        return jnp.asarray(loss(model(params)))

    def parts(self) -> tuple[Callable[..., jax.typing.ArrayLike], Callable[..., tree.PyTree]]:
        """The loss of the outputs alone and the model of the parameters alone."""
        loss_data, model_data = data_of(self.loss, self.data), data_of(self.model, self.data)
        if self.chunks == 1:
            return lambda y: self.loss(y, **loss_data), lambda p: self.model(p, **model_data)

        def loss(outputs: tree.PyTree) -> jax.Array:
            cut = self._cut(loss_data) if loss_data else {}
            losses = jax.lax.map(lambda chunk: self.loss(chunk[0], **chunk[1]), (outputs, cut))
            return jnp.mean(losses)

        def model(params: tree.PyTree) -> tree.PyTree:
            handed = _summed_in_float32(params)
            return jax.lax.map(lambda chunk: self.model(handed(), **chunk), self._cut(model_data))

        return loss, model

    @property
    def examples(self) -> int:
        """How many there are: the length of the leading axis of all data.

        Raises:
          ValueError: there are no data, or they differ in it.
        """
        shapes = [jnp.shape(x) for x in jax.tree.leaves(self.data)]
        if not shapes or any(not shape or shape[0] != shapes[0][0] for shape in shapes):
            raise ValueError(
                "compose: a sub-batch is of data with a common leading axis, given by keyword to "
                f"compose or to update; their shapes are {shapes}"
            )
        return shapes[0][0]

    def sample(self, size: int, key: jax.Array) -> "Composed":
        """The function of ``size`` of its examples, drawn without replacement.

        Raises:
          ValueError: there are fewer, or the chunks do not divide ``size``.
        """
        if size > self.examples or size % self.chunks:
            raise ValueError(
                f"hessian_free(curvature_batch_size={size}): {size} examples cannot be drawn from "
                f"{self.examples} in {self.chunks} chunks: give at most all of them and a multiple "
                "of the chunks"
            )
        drawn = jax.random.permutation(key, self.examples)[:size]
        data = jax.tree.map(lambda x: jnp.asarray(x)[drawn], self.data)
        return dataclasses.replace(self, data=data)

    def mean_over_chunks(self, f: Callable[["Composed"], tree.PyTree]) -> tree.PyTree:
        """The mean of ``f`` of every chunk, one after the other; nothing is kept between them."""
        cut = self._cut(self.data)

        @jax.checkpoint
        def add(total: tree.PyTree, data: Mapping[str, Any]) -> tuple[tree.PyTree, None]:
            of_chunk = f(Composed(self.loss, self.model, data))
            return jax.tree.map(jnp.add, total, of_chunk), None

        first = jax.tree.map(lambda x: x[0], cut)
        shapes = jax.eval_shape(lambda data: f(Composed(self.loss, self.model, data)), first)
        zeros = jax.tree.map(lambda x: tree.promote(jnp.zeros(x.shape, x.dtype)), shapes)
        total, _ = jax.lax.scan(add, zeros, cut)
        return jax.tree.map(lambda x, one: (x / self.chunks).astype(one.dtype), total, shapes)

    def _cut(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The data with a leading axis of chunks."""

        def cut(path: Any, x: jax.Array) -> jax.Array:
            shape = jnp.shape(x)
            if not shape or shape[0] % self.chunks:
                name = jax.tree_util.keystr(path)
                raise ValueError(
                    f"compose(chunks={self.chunks!r}): the data{name} have shape {shape}, and "
                    "chunks must divide the leading axis; close over what is not cut into chunks"
                )
            return jnp.reshape(x, (self.chunks, shape[0] // self.chunks, *shape[1:]))

        if not jax.tree.leaves(data):
            raise ValueError(
                f"compose(chunks={self.chunks!r}): no data to cut; give them by keyword to compose "
                "or to update, for instance gx.compose(loss, model, chunks=2, x=x, y=y)"
            )
        return jax.tree_util.tree_map_with_path(cut, data)


def _summed_in_float32(params: tree.PyTree) -> Callable[[], tree.PyTree]:
    """Hands ``params`` to each chunk so that gradients of half precision are summed in float32."""

    def is_half(x: Any) -> bool:
        return getattr(x, "dtype", None) in (jnp.bfloat16, jnp.float16)

    wide = jax.tree.map(lambda x: tree.promote(x) if is_half(x) else x, params)
    return lambda: jax.tree.map(lambda w, x: w.astype(x.dtype) if is_half(x) else w, wide, params)


def data_of(function: Callable[..., Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``data`` a function takes beside its first argument: by name, or all by ``**``.

    Raises:
      TypeError: it takes such an argument by position alone.
    """
    try:
        arguments = list(inspect.signature(function).parameters.values())
    except ValueError:  # a callable that has no signature takes its first argument alone
        return {}
    if any(a.kind is a.VAR_KEYWORD for a in arguments):
        return {k: v for k, v in data.items() if k not in ("value", "grad", "value_fn")}
    for a in arguments[1:]:
        if a.kind is a.POSITIONAL_ONLY and a.name in data:
            name = getattr(function, "__name__", type(function).__name__)
            raise TypeError(
                f"data reach a function by name, but {name} takes {a.name} by position alone: "
                f"leave out the / behind {a.name} in its signature"
            )
    return {a.name: data[a.name] for a in arguments[1:] if a.name in data}


def bind(
    value_fn: Callable[..., jax.typing.ArrayLike],
    extra_args: Mapping[str, Any],
    name: str = "value_fn",
) -> Callable[[tree.PyTree], jax.Array]:
    """``value_fn`` as a function of the parameters alone, called ``name`` in errors.

    Data passed to ``update`` by keyword reach the arguments of ``value_fn`` of the same name, as in
    Optax; a ``value_fn`` with ``**kwargs`` gets all of them. One from :func:`gradxform.compose`
    stays one, with the data in its parts.

    Raises:
      TypeError: ``value_fn`` is no function.
      ValueError: when called, if the value is not one real number.
    """
    if not callable(value_fn):
        raise TypeError(f"{name}={shown(value_fn)}: expected a function of the parameters")
    if isinstance(value_fn, Composed):
        loss = value_fn.loss
        data = {**data_of(loss, extra_args), **data_of(value_fn.model, extra_args)}

        # shows the signature of loss, which says what data it takes
        @functools.wraps(loss, updated=())
        def checked(outputs: tree.PyTree, **data: Any) -> jax.Array:
            return check_value(name, loss(outputs, **data))

        return dataclasses.replace(value_fn, loss=checked, data={**value_fn.data, **data})
    data = data_of(value_fn, extra_args)
    return lambda params: check_value(name, value_fn(params, **data))


def check_value(name: str, value: jax.typing.ArrayLike) -> jax.Array:
    """``value``, if it is one real floating-point number."""
    try:
        value = jnp.asarray(value)
    except TypeError:
        raise ValueError(
            f"{name} must return one real number, got {type(value).__name__}"
        ) from None
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{name} must return one real number, got {value.dtype} of shape {value.shape}; "
            "reduce it, for instance by jnp.mean"
        )
    return value
