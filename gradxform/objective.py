"""The objective: :func:`compose` of a loss and a model, and the binding of data."""

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
    """An objective made of a loss L and a model f: J(θ) = L(f(θ)).

    The result is a function of the parameters. :func:`gradxform.gauss_newton` finds the loss and
    the model in it. Data reach the arguments of the same name: ``gx.compose(loss, model, x=x,
    y=y)`` computes ``loss(model(params, x=x), y=y)``. Data may also be passed to ``update`` by
    keyword. The model is any function whose first argument is the parameters. A function with
    ``**kwargs`` gets all data, so name the arguments of such a model by a lambda:

    * a plain function ``model(params, x)``;
    * ``lambda params, x: module.apply(params, x)`` for Flax linen;
    * ``lambda params, x: equinox.combine(params, static)(x)`` for Equinox;
    * ``gx.nnx_value_fn(module, lambda module, x: module(x))`` for Flax NNX.

    With ``chunks=m`` the data are cut along their leading axis into m chunks of equal size, which
    are computed one after the other to save memory::

        J(θ) = 1/m Σᵢ L(f(θ, xᵢ), yᵢ)

    Value, gradient and curvature products stay the same up to rounding if the loss is a mean over
    examples and no example influences the outputs of another. The sums are in at least float32.

    Args:
      loss: a function of the outputs, and of data, that returns one real number.
      model: a function of the parameters, and of data, that returns the outputs: any pytree of
        floating-point or complex arrays.
      chunks: m ≥ 1, a divisor of the leading axis of the data.
      recompute: True computes each chunk again for a gradient or product. This takes the memory of
        one chunk, and one more pass through the model. False stores the intermediate results of
        all chunks.
      **data: arrays, or pytrees of arrays.

    Returns:
      The objective, a function with the attributes ``loss`` and ``model``.

    Raises:
      TypeError: loss or model is not a function or takes data only by position, or ``chunks`` is
        not an integer.
      ValueError: ``chunks`` is not positive or does not divide the data, or neither loss nor model
        takes an argument of that name.

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


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Composed:
    """An objective from :func:`compose`: a pytree whose leaves are its data."""

    loss: Callable[..., jax.typing.ArrayLike]  #: L, a function of the outputs and of data
    model: Callable[..., tree.PyTree]  #: f, a function of the parameters and of data
    data: Mapping[str, Any]  #: the data bound so far, by name
    chunks: int = 1  #: number of chunks that the data are cut into
    recompute: bool = True  #: whether each chunk is computed again for a gradient or product

    def __call__(self, params: tree.PyTree, *args: Any, **data: Any) -> jax.Array:
        if args:
            raise TypeError(
                "compose: the objective takes its data by name, for instance "
                "objective(params, x=x, y=y)"
            )
        bound = dataclasses.replace(self, data={**self.data, **data})
        if self.chunks > 1 and self.recompute:
            inputs = _summed_in_float32(params)
            return bound.mean_over_chunks(lambda chunk: chunk(inputs()))
        loss, model = bound.parts()
        return jnp.asarray(loss(model(params)))

    def parts(self) -> tuple[Callable[..., jax.typing.ArrayLike], Callable[..., tree.PyTree]]:
        """The loss as a function of only the outputs, and the model of only the parameters."""
        loss_data, model_data = data_of(self.loss, self.data), data_of(self.model, self.data)
        _check_complete("loss", self.loss, loss_data)
        _check_complete("model", self.model, model_data)
        if self.chunks == 1:
            return lambda y: self.loss(y, **loss_data), lambda p: self.model(p, **model_data)

        def loss(outputs: tree.PyTree) -> jax.Array:
            cut = self._cut(loss_data) if loss_data else {}
            losses = jax.lax.map(lambda chunk: self.loss(chunk[0], **chunk[1]), (outputs, cut))
            return jnp.mean(losses)

        def model(params: tree.PyTree) -> tree.PyTree:
            inputs = _summed_in_float32(params)
            return jax.lax.map(lambda chunk: self.model(inputs(), **chunk), self._cut(model_data))

        return loss, model

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        rest = (self.loss, self.model, self.chunks, self.recompute)
        return ((jax.tree_util.GetAttrKey("data"), dict(self.data)),), rest

    @classmethod
    def tree_unflatten(cls, rest: tuple[Any, ...], children: tuple[Any, ...]) -> "Composed":
        return cls(*rest[:2], *children, *rest[2:])

    @property
    def examples(self) -> int:
        """The number of examples: the length of the leading axis of all data.

        Raises:
          ValueError: there are no data, or their leading axes differ.
        """
        shapes = self._shapes()
        if not self.has_examples:
            raise ValueError(
                "compose: a sub-batch needs data with a common leading axis, passed by keyword to "
                f"compose or to update; the shapes are {shapes}"
            )
        return shapes[0][0]

    @property
    def has_examples(self) -> bool:
        """Whether there are data, and their leading axes are equal."""
        shapes = self._shapes()
        return bool(shapes) and all(shape and shape[0] == shapes[0][0] for shape in shapes)

    def _shapes(self) -> list[tuple[int, ...]]:
        return [jnp.shape(x) for x in jax.tree.leaves(self.data)]

    def spread(self, size: int) -> "Composed":
        """The objective on ``size`` of its examples, evenly spread over them.

        Each device gives its share of data that are divided over devices.
        """
        every = self.examples // size

        def thin(x: jax.Array) -> jax.Array:
            x = jnp.asarray(x)[: size * every]
            return x.reshape(size, every, *x.shape[1:])[:, 0]

        return dataclasses.replace(self, data=jax.tree.map(thin, self.data))

    def sample(self, size: int, key: jax.Array) -> "Composed":
        """The objective on ``size`` of its examples, drawn without replacement.

        Raises:
          ValueError: there are fewer examples, or the number of chunks does not divide ``size``.
        """
        if size > self.examples or size % self.chunks:
            raise ValueError(
                f"hessian_free(curvature_batch_size={size}): the data have {self.examples} "
                f"examples in {self.chunks} chunks: give at most {self.examples}"
                + (f", and a multiple of {self.chunks}" if self.chunks > 1 else "")
            )
        drawn = jax.random.permutation(key, self.examples)[:size]
        data = jax.tree.map(lambda x: jnp.asarray(x)[drawn], self.data)
        return dataclasses.replace(self, data=data)

    def mean_over_chunks(self, f: Callable[["Composed"], tree.PyTree]) -> tree.PyTree:
        """The mean of ``f`` over the chunks, computed one after the other."""
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
                    f"compose(chunks={self.chunks!r}): chunks must divide the leading axis of the "
                    f"data, but data{name} has shape {shape}; close over arrays that are not to be "
                    "cut into chunks"
                )
            return jnp.reshape(x, (self.chunks, shape[0] // self.chunks, *shape[1:]))

        if not jax.tree.leaves(data):
            raise ValueError(
                f"compose(chunks={self.chunks!r}): there are no data to cut into chunks; pass them "
                "by keyword to compose or to update, for instance gx.compose(loss, model, "
                "chunks=2, x=x, y=y)"
            )
        return jax.tree_util.tree_map_with_path(cut, data)


def _summed_in_float32(params: tree.PyTree) -> Callable[[], tree.PyTree]:
    """A function that returns ``params``, with half-precision gradients summed in float32."""

    def is_half(x: Any) -> bool:
        return getattr(x, "dtype", None) in (jnp.bfloat16, jnp.float16)

    wide = jax.tree.map(lambda x: tree.promote(x) if is_half(x) else x, params)
    return lambda: jax.tree.map(lambda w, x: w.astype(x.dtype) if is_half(x) else w, wide, params)


def data_of(function: Callable[..., Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``data`` that a function takes by name, after its first argument.

    A function with ``**kwargs`` takes all of them.

    Raises:
      TypeError: the function takes such an argument only by position.
    """
    arguments = _arguments(function)
    if any(a.kind is a.VAR_KEYWORD for a in arguments):
        return {k: v for k, v in data.items() if k not in ("value", "grad", "value_fn")}
    for a in arguments[1:]:
        if a.kind is a.POSITIONAL_ONLY and a.name in data:
            name = getattr(function, "__name__", type(function).__name__)
            raise TypeError(
                f"data are passed by name, but {name} takes {a.name} only by position: remove the "
                f"/ after {a.name} from its signature"
            )
    return {a.name: data[a.name] for a in arguments[1:] if a.name in data}


def _arguments(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The arguments of a function; none are known of a callable without a signature."""
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        return []


def _check_complete(part: str, function: Callable[..., Any], data: Mapping[str, Any]) -> None:
    """Raises a TypeError that names the first argument which the data do not have."""
    for a in _arguments(function)[1:]:
        is_named = a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)
        if is_named and a.default is a.empty and a.name not in data:
            raise TypeError(
                f"compose: the {part} needs {a.name}=…: pass it to compose, to the objective or to "
                "update by that name"
            )


def bind(
    value_fn: Callable[..., jax.typing.ArrayLike],
    extra_args: Mapping[str, Any],
    name: str = "value_fn",
) -> Callable[[tree.PyTree], jax.Array]:
    """``value_fn`` as a function of only the parameters; errors call it ``name``.

    Keyword arguments of ``update`` reach the arguments of ``value_fn`` of the same name, as in
    Optax; a ``value_fn`` with ``**kwargs`` gets all of them. A :class:`Composed` objective stays
    one.

    Raises:
      TypeError: ``value_fn`` is not a function.
      ValueError: when the result is called, if the value is not one real number.
    """
    if not callable(value_fn):
        raise TypeError(f"{name}={shown(value_fn)}: expected a function of the parameters")
    if isinstance(value_fn, Composed):
        loss = value_fn.loss
        data = {**data_of(loss, extra_args), **data_of(value_fn.model, extra_args)}

        # keeps the signature of loss, which says what data it takes
        @functools.wraps(loss, updated=())
        def checked(outputs: tree.PyTree, **data: Any) -> jax.Array:
            return check_value(name, loss(outputs, **data))

        return dataclasses.replace(value_fn, loss=checked, data={**value_fn.data, **data})
    data = data_of(value_fn, extra_args)
    return lambda params: check_value(name, value_fn(params, **data))


def substituted(
    value_fn: Callable[..., Any], change: Callable[[tree.PyTree], tree.PyTree]
) -> Callable[..., Any]:
    """``value_fn(change(params))`` as a function of ``params``; a :class:`Composed` stays one.

    Raises:
      TypeError: ``value_fn`` is not a function.
    """
    if not callable(value_fn):
        raise TypeError(f"value_fn={shown(value_fn)}: expected a function of the parameters")
    if isinstance(value_fn, Composed):
        return dataclasses.replace(value_fn, model=substituted(value_fn.model, change))

    # keeps the signature of value_fn, which says what data it takes
    @functools.wraps(value_fn, updated=())
    def changed(params: tree.PyTree, *args: Any, **data: Any) -> Any:
        return value_fn(change(params), *args, **data)

    return changed


def check_value(name: str, value: jax.typing.ArrayLike) -> jax.Array:
    """``value`` as an array, or a ValueError if it is not one real floating-point number."""
    try:
        value = jnp.asarray(value)
    except TypeError:
        raise ValueError(
            f"{name} must return one real number, got {type(value).__name__}"
        ) from None
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        mend = "reduce it, for instance by jnp.mean"
        if tree.is_complex(value):
            mend = "take its real part, or |z|² = z.real**2 + z.imag**2 of its terms"
        raise ValueError(
            f"{name} must return one real number, got {value.dtype} of shape {value.shape}; {mend}"
        )
    return value
