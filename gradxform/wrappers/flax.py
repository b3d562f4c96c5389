"""``value_fn`` of Flax NNX modules."""

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

    Optimizer hands parameters to a method as an ``nnx.State``; this gives the function of such a
    state that puts it into a copy of the module, with everything else as it is now, and evaluates
    ``loss`` on that. What the loss changes in the copy (batch statistics, random counters) is
    dropped: ``model`` is neither changed nor referred to.

    Call it before ``nnx.value_and_grad``, which moves the random counters on: with dropout,
    ``value_fn`` then has the masks that the gradient was taken with.

    Args:
      model: the module.
      loss: of a module, and of data, to one real number. Data given to ``update`` by keyword reach
        the arguments of the same name.
      wrt: which variables are the parameters, the filter that the optimizer has; ``None`` for
        ``nnx.Param``.

    Raises:
      ImportError: Flax is not installed.

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
    except Exception as error:  # Flax has many, some of them of no use
        raise TypeError(
            f"nnx_value_fn(model={shown(model)}, wrt={shown(wrt)}): expected a Flax NNX module and "
            "a filter of its variables, for instance nnx.Param"
        ) from error
    rest = nnx.as_pure(rest)

    # shows the signature of loss, which says what data it takes
    @functools.wraps(loss, updated=())
    def value_fn(params: tree.PyTree, *args: Any, **data: Any) -> jax.typing.ArrayLike:
        return loss(nnx.merge(graphdef, params, rest), *args, **data)

    return value_fn
