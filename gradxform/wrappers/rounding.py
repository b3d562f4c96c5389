"""Stochastic rounding: half-precision parameters that do not lose small updates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.hyperparameters import Seed, checked
from gradxform.protocol import require_params, transformation
from gradxform.sharding import sharded_like


class RoundedStochasticallyState(NamedTuple):
    """State of :func:`rounded_stochastically`."""

    key: jax.Array  #: raw key data for the next update's random numbers
    inner_state: optax.OptState  #: the state of the method, for parameters in at least float32


@checked
def rounded_stochastically(
    tx: optax.GradientTransformation, *, seed: Seed = 0
) -> optax.GradientTransformationExtraArgs:
    """Rounds bfloat16 and float16 parameters at random, so that small updates are not lost.

    ``optax.apply_updates`` rounds θ + u to the nearest number of the dtype of θ. If u is less than
    half the distance to the next number, θ does not move at all. This wrapper chooses one of the
    two neighbours a ≤ θ + u ≤ b at random, so that the mean is right::

        P(b) = (θ + u − a) / (b − a)
        E[θ_new] = θ + u

    ``tx`` computes u in float32: it gets parameters and gradient in float32, and so its state is in
    float32 too. Parameters in float32 or float64 are not rounded.

    The update is in the dtype of the parameters too, and an update to a or b may have too many
    digits for it. This happens only if u is larger than half of θ. Then a or b is a number a little
    farther away, and the mean is still right.

    Args:
      tx: the method, usually one that takes many small steps. Line searches and trust regions gain
        nothing: their steps are large, and they compare values.
      seed: seed of the random numbers. Equal seeds give equal runs.

    Returns:
      The transformation. ``update`` needs ``params`` and what ``tx`` needs. Nothing may change its
      updates afterwards, so put it around the whole chain.

    Raises:
      TypeError, ValueError: ``seed`` is no integer of 32 bits, or ``update`` is not given
        ``params``.

    References:
      Gupta et al., "Deep learning with limited numerical precision", ICML 2015. Croci et al.,
      "Stochastic rounding: implementation, error analysis and applications", R. Soc. Open Sci.
      9:211631 (2022).

    >>> import jax, jax.numpy as jnp, optax, gradxform as gx
    >>> def mean_after(tx):  # 1 − 100 · 0.001 = 0.9
    ...     theta = jnp.ones(1000, jnp.bfloat16)
    ...     state = tx.init(theta)
    ...     for _ in range(100):
    ...         updates, state = tx.update(jnp.ones_like(theta), state, theta)
    ...         theta = optax.apply_updates(theta, updates)
    ...     return round(float(jnp.mean(theta, dtype=jnp.float32)), 2)
    >>> mean_after(gx.sgd(0.001)), mean_after(gx.rounded_stochastically(gx.sgd(0.001)))
    (1.0, 0.9)
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: tree.PyTree) -> RoundedStochasticallyState:
        key = jax.random.key(jnp.asarray(seed).astype(jnp.uint32))
        wide = jax.tree.map(tree.promote, params)
        return RoundedStochasticallyState(jax.random.key_data(key), inner.init(wide))

    def update(
        updates: tree.PyTree,
        state: RoundedStochasticallyState,
        params: tree.PyTree | None = None,
        *,
        grad: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, RoundedStochasticallyState]:
        params = require_params("rounded_stochastically", params, updates)
        if grad is not None:
            extra_args["grad"] = jax.tree.map(tree.promote, grad)
        wide_grads, wide_params = (jax.tree.map(tree.promote, x) for x in (updates, params))
        wide, inner_state = inner.update(wide_grads, state.inner_state, wide_params, **extra_args)

        leaves, structure = jax.tree.flatten(params)
        key, *draws = jax.random.split(jax.random.wrap_key_data(state.key), len(leaves) + 1)
        draws = jax.tree.unflatten(structure, draws)
        rounded = jax.tree.map(_rounded_update, wide, params, draws)
        new_state = RoundedStochasticallyState(jax.random.key_data(key), inner_state)
        return tree.cast_like(rounded, updates), new_state

    return transformation(init, update)


def _rounded_update(update: jax.Array, param: jax.Array, key: jax.Array) -> jax.Array:
    """One of two updates in the dtype of ``param``, which lead around ``param + update``."""
    dtype = jnp.result_type(param)
    if tree.wide(dtype) == dtype:
        return update
    u, p = tree.promote(update), tree.promote(param)
    exact = p + u

    def after(v: jax.Array) -> jax.Array:  # what optax.apply_updates makes of v
        return _rounded(p + v, dtype, jnp.round)

    def toward(outward: Callable[[jax.Array], jax.Array]) -> jax.Array:
        neighbour = _rounded(exact, dtype, outward)
        v = _rounded(neighbour - p, dtype, jnp.round)
        # the update to the neighbour may have too many digits; then take one that leads beyond
        return jnp.where(after(v) == neighbour, v, _rounded(neighbour - p, dtype, outward))

    low, high = toward(jnp.floor), toward(jnp.ceil)
    share = tree.divide(exact - after(low), after(high) - after(low))
    uniform = sharded_like(jax.random.uniform(key, u.shape, u.dtype), u)
    return jnp.where(jnp.isfinite(exact), jnp.where(uniform < share, high, low), u)


def _rounded(
    x: jax.Array, dtype: jnp.dtype, to_integer: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """``x`` rounded to a finite number of the narrower ``dtype``.

    A conversion to the dtype and back would not do: XLA may leave it out.
    """
    narrow, own = jnp.finfo(dtype), jnp.finfo(x.dtype)
    _, exponent = jnp.frexp(x)
    unit = jnp.ldexp(jnp.full_like(x, narrow.eps), exponent - 1)  # of the last place
    # accelerators flush numbers below the smallest normal one to zero
    unit = jnp.maximum(unit, max(float(narrow.smallest_subnormal), float(own.tiny)))
    largest = float(narrow.max)
    return jnp.clip(to_integer(x / unit) * unit, -largest, largest)
