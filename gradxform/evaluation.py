"""Where to evaluate: ``eval_params`` finds θ when the loop holds another point."""

import functools

import optax

from gradxform.tree import PyTree


@functools.singledispatch
def eval_params(state: optax.OptState, params: PyTree) -> PyTree:
    r"""The parameters to evaluate, deploy or report.

    Most methods keep them in the loop and get ``params`` itself back. Some do not: with
    :func:`gradxform.nesterov` the loop holds the interim point :math:`\tilde\theta = \theta +
    \alpha v` and this returns θ; with :func:`gradxform.polyak_average` it returns the average. The
    state may be nested in any way: ``optax.chain``, ``masked``, ``partition``,
    ``inject_hyperparams``, ``MultiSteps``, ``apply_if_finite``, or a container of your own.

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
    if isinstance(state, dict):
        state = tuple(state.values())
    if isinstance(state, tuple | list):
        for inner in state:
            params = eval_params(inner, params)
    return params
