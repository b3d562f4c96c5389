"""``eval_params``: the parameters to evaluate, if the loop holds another point."""

import functools

import jax.numpy as jnp
import optax
from jax.tree_util import default_registry

from gradxform.hyperparameters import readable, scalar
from gradxform.leaves import map_unmasked
from gradxform.tree import PyTree


@functools.singledispatch
@readable
def eval_params(state: optax.OptState, /, params: PyTree) -> PyTree:
    """The parameters to evaluate, deploy or report.

    With most methods these are the parameters in the loop, and ``params`` itself is returned. Other
    methods hold another point in the loop:

    * line searches and trust regions hold a trial point; this returns the accepted point;
    * :func:`gradxform.nesterov` holds θ̃ = θ + αv; this returns θ;
    * with :func:`gradxform.polyak_average` this returns the average;
    * ``optax.contrib.schedule_free`` holds an interim point; this returns the average;
    * ``optax.lookahead`` holds ``LookaheadParams``; this returns the slow ones;
    * ``optax.contrib.sam`` holds the disturbed parameters in every other step; this returns the
      undisturbed ones.

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
      A pytree with the structure and dtypes of ``params`` (for ``optax.lookahead``, of
      ``params.slow``), or the object ``params`` itself.

    Raises:
      ValueError: the state belongs to parameters of another structure, or the arguments are
        swapped.

    References:
      Defazio et al., "The road less scheduled", NeurIPS 2024. Zhang et al., "Lookahead optimizer: k
      steps forward, 1 step back", NeurIPS 2019. Foret et al., "Sharpness-aware minimization for
      efficiently improving generalization", ICLR 2021.

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


@eval_params.register
def _(state: optax.contrib.ScheduleFreeState, params: PyTree) -> PyTree:
    b1 = scalar(state.b1)  # the loop holds y = (1 − β₁) z + β₁ x, and x is the average
    return map_unmasked(lambda y, z: (y - (1 - b1) * z) / b1, params, state.z)


@eval_params.register
def _(state: optax.LookaheadState, params: PyTree) -> PyTree:
    if not isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "eval_params: optax.lookahead keeps its slow parameters beside the fast ones: pass the "
            "optax.LookaheadParams that the loop holds"
        )
    return params.slow


@eval_params.register
def _(state: optax.contrib.SAMState, params: PyTree) -> PyTree:
    if state.cache is not None:  # otherwise the disturbed parameters never reach the loop
        is_undisturbed = jnp.asarray(state.steps_since_sync) == 0
        params = map_unmasked(lambda p, c: jnp.where(is_undisturbed, p, c), params, state.cache)
    return eval_params(state.opt_state, params)
