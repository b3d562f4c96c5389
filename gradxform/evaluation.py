"""``eval_params``: the parameters to evaluate, if the loop holds another point."""

import functools

import optax
from jax.tree_util import default_registry

from gradxform.hyperparameters import readable
from gradxform.tree import PyTree


@functools.singledispatch
@readable
def eval_params(state: optax.OptState, /, params: PyTree) -> PyTree:
    """The parameters to evaluate, deploy or report.

    With most methods these are the parameters in the loop, and ``params`` itself is returned. Other
    methods hold another point in the loop:

    * line searches and trust regions hold a trial point; this returns the accepted point;
    * :func:`gradxform.nesterov` holds θ̃ = θ + αv; this returns θ;
    * with :func:`gradxform.polyak_average` this returns the average.

    The state may be nested in ``optax.chain``, ``masked``, ``partition``, ``inject_hyperparams``,
    ``MultiSteps``, ``apply_if_finite``, or any pytree, such as a Flax ``TrainState``. For a Flax
    NNX optimizer pass ``nnx.as_pure(optimizer.opt_state)`` and
    ``nnx.as_pure(nnx.state(model, nnx.Param))``.

    To support your own state, write ``@gx.eval_params.register(MyState)`` above a function
    ``(state, params) -> params``.

    Args:
      state: the optimiser state after the last ``update``.
      params: the parameters in the loop, with the structure that ``init`` got.

    Returns:
      A pytree with the structure and dtypes of ``params``, or the object ``params`` itself.

    Raises:
      ValueError: the state belongs to parameters of another structure, or the arguments are
        swapped.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.nesterov(learning_rate=0.1, momentum=0.5)
    >>> theta = jnp.asarray(1.0)
    >>> updates, state = tx.update(theta, tx.init(theta), theta)
    >>> interim = theta + updates  # v = -0.1, so θ = 0.9 and θ̃ = 0.9 + 0.5 v
    >>> round(float(interim), 6), round(float(gx.eval_params(state, interim)), 6)
    (0.85, 0.9)
    """
    if any(_is_known(x) for x in ((params, *params) if isinstance(params, tuple) else (params,))):
        raise ValueError("eval_params: params is a state; call eval_params(state, params)")
    children = default_registry.flatten_one_level(state)
    for child in children[0] if children else ():
        params = eval_params(child, params)
    return params


def _is_known(state: PyTree) -> bool:
    """Whether ``eval_params`` has a function of its own for this state."""
    return eval_params.dispatch(type(state)) is not eval_params.dispatch(object)
