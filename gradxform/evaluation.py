"""Where to evaluate: ``eval_params`` finds θ when the loop holds another point."""

import functools

import optax
from jax.tree_util import default_registry

from gradxform.hyperparameters import readable
from gradxform.tree import PyTree


@functools.singledispatch
@readable
def eval_params(state: optax.OptState, /, params: PyTree) -> PyTree:
    r"""The parameters to evaluate, deploy or report.

    Most methods keep them in the loop and get ``params`` itself back. Some do not: with
    :func:`gradxform.nesterov` the loop holds the interim point :math:`\tilde\theta = \theta +
    \alpha v` and this returns θ; with :func:`gradxform.polyak_average` it returns the average. The
    state may be nested in any way: ``optax.chain``, ``masked``, ``partition``,
    ``inject_hyperparams``, ``MultiSteps``, ``apply_if_finite``, or any pytree of your own, such as
    a whole Flax ``TrainState``. For a Flax NNX optimizer pass ``nnx.as_pure(optimizer.opt_state)``
    and ``nnx.as_pure(nnx.state(model, nnx.Param))``.

    A method of yours joins in by ``@gx.eval_params.register(MyState)`` on a function
    ``(state, params) -> params``.

    Args:
      state: the optimiser state after the last ``update``.
      params: the parameters in the loop, of the structure ``init`` was given.

    Returns:
      A pytree of the structure and dtypes of ``params``; ``params`` itself, the same object, where
      the loop already holds them.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.nesterov(learning_rate=0.1, momentum=0.5)
    >>> theta = jnp.asarray(1.0)
    >>> updates, state = tx.update(theta, tx.init(theta), theta)
    >>> interim = theta + updates  # v = -0.1, so θ = 0.9 and θ̃ = 0.9 + 0.5 v
    >>> round(float(interim), 6), round(float(gx.eval_params(state, interim)), 6)
    (0.85, 0.9)
    """
    children = default_registry.flatten_one_level(state)
    for child in children[0] if children else ():
        params = eval_params(child, params)
    return params
