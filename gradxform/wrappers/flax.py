"""The ``value_fn`` of a Flax NNX module."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from gradxform import tree
from gradxform.hyperparameters import checked, shown


@checked
def nnx_value_fn(
    model: Any, loss: Callable[..., jax.typing.ArrayLike], wrt: Any = None
) -> Callable[..., jax.typing.ArrayLike]:
    """The ``value_fn`` of a Flax NNX module, for ``nnx.Optimizer.update(…, value_fn=…)``.

    ``nnx.Optimizer`` passes parameters to a method as an ``nnx.State``. The result of this function
    takes such a state, puts it into a copy of the module and evaluates ``loss`` on the copy.
    Changes that the loss makes in the copy (batch statistics, random counters) are dropped, so
    ``model`` does not change.

    Call it before ``nnx.value_and_grad``, which advances the random counters. With dropout,
    ``value_fn`` then uses the same masks as the gradient.

    Args:
      model: the module.
      loss: a function of a module, and of data, that returns one real number. Keyword arguments of
        ``update`` reach the arguments of the same name.
      wrt: the filter of the optimizer that selects the parameters; ``None`` for ``nnx.Param``.

    Returns:
      A function of the parameters, and of data.

    Raises:
      ImportError: Flax is not installed.
      TypeError: ``model`` is not a Flax NNX module, or ``wrt`` is not a filter.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> from flax import nnx
    >>> model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, gx.coordinate_descent(), wrt=nnx.Param)
    >>> loss = lambda model: jnp.sum((model(jnp.ones((1, 1))) - 2) ** 2)
    >>> value_fn = gx.nnx_value_fn(model, loss)
    >>> value, grads = nnx.value_and_grad(loss)(model)
    >>> updates = optimizer.update(model, grads, value=value, value_fn=value_fn)
    >>> model.kernel[...].round(3)
    Array([[2.]], dtype=float32)
    """
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError("nnx_value_fn needs Flax: pip install flax") from error
    try:
        graphdef, _, rest = nnx.split(model, nnx.Param if wrt is None else wrt, ...)
    except Exception as error:  # Flax raises errors of many kinds
        raise TypeError(
            f"nnx_value_fn(model={shown(model)}, wrt={shown(wrt)}): expected a Flax NNX module and "
            "a filter of its variables, for instance nnx.Param"
        ) from error
    rest = nnx.as_pure(rest)

    # keeps the signature of loss, which says what data it takes
    @functools.wraps(loss, updated=())
    def value_fn(params: tree.PyTree, *args: Any, **data: Any) -> jax.typing.ArrayLike:
        return loss(nnx.merge(graphdef, params, rest), *args, **data)

    return value_fn
