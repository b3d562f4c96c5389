"""What the Kronecker methods share: the batch of an update, its sub-batches, and the counts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradxform import protocol, tree
from gradxform.hyperparameters import Scalar, scalar
from gradxform.objective import Composed, bind, check_value
from gradxform.second_order import kronecker_factors as kf
from gradxform.second_order import random_passes as passes

_ENOUGH = 256  # examples: with fewer, ten outputs each say too little about the curvature


class Batch(NamedTuple):
    """What an update gets."""

    method: str
    params: tree.PyTree
    value: jax.Array
    value_fn: Composed
    g: tree.PyTree  # the gradient in at least float32; zero if it or the value is not finite
    finite: jax.Array  # whether value and gradient are

    def part(self, argument: str, size: int | None) -> passes.Part:
        """Examples evenly spread over the batch: ``size`` of them, or the default number."""
        return _part(self.method, argument, self.value_fn, size)

    def probe(
        self, part: passes.Part, is_sum: jax.Array
    ) -> Callable[[jax.Array, int], passes.Probe]:
        """A random backward pass on a part of the examples, of a key and Lanczos's steps."""

        def probe(key: jax.Array, lanczos: int) -> passes.Probe:
            at = passes.scaled(passes.linearised(part, self.params), part, is_sum)
            return passes.probe(at, self.params, key, lanczos)

        return probe


def batch_of(
    method: str,
    grads: tree.PyTree,
    params: tree.PyTree | None,
    value: jax.typing.ArrayLike | None,
    value_fn: Any,
    extra_args: Any,
) -> Batch:
    params = protocol.require_params(method, params, grads)
    value = scalar(check_value("value", protocol.require(method, "value", value)))
    value_fn = bind(protocol.require(method, "value_fn", value_fn), extra_args)
    protocol.check_unmasked(method, params)
    if not isinstance(value_fn, Composed):
        raise ValueError(
            f"{method} needs to know which part of value_fn is the loss and which is the model: "
            "pass value_fn=gx.compose(loss, model), where loss(model(params)) is the value"
        )
    g = jax.tree.map(tree.promote, grads)
    finite = jnp.isfinite(value) & jnp.isfinite(tree.max_abs(g))
    g = tree.select(finite, g, jax.tree.map(jnp.zeros_like, g))
    params = jax.tree.map(tree.promote, params)
    return Batch(method, params, jnp.where(finite, value, 0), value_fn, g, finite)


def _part(method: str, argument: str, value_fn: Composed, size: int | None) -> passes.Part:
    if size is None and not value_fn.has_examples:
        return passes.Part(value_fn, 1)
    n = value_fn.examples
    if size is None:
        size = min(n, max(n // 4, _ENOUGH))
        size = max(size // value_fn.chunks, 1) * value_fn.chunks
    if size > n or size % value_fn.chunks:
        raise ValueError(
            f"{method}({argument}={size}): the data have {n} examples in {value_fn.chunks} "
            f"chunks: give at most {n}"
            + (f", and a multiple of {value_fn.chunks}" if value_fn.chunks > 1 else "")
        )
    return passes.Part(value_fn.spread(size), n / size)


def number(x: Scalar = 0.0) -> jax.Array:
    return jnp.array(scalar(x), copy=True)


def after(turn: jax.Array) -> jax.Array:
    """The turn after this one; turns never stop, where a count stays at its largest value."""
    return jnp.where(turn == jnp.iinfo(turn.dtype).max, 0, turn + 1)


def counted(
    info: Any, batch: Batch, made: kf.Refreshed, usable: jax.Array, gradients: jax.Array
) -> Any:
    """``info`` with the counts after one more update."""

    def more(count: jax.Array, happened: jax.Array) -> jax.Array:
        return tree.add_count(count, happened.astype(jnp.int32))

    return info._replace(
        curvature_products=more(info.curvature_products, made.probes),
        gradient_equivalents=info.gradient_equivalents + gradients,
        inversions=more(info.inversions, made.inversions),
        fallbacks=more(info.fallbacks, batch.finite & ~usable),
        non_finite=more(info.non_finite, ~batch.finite),
        indefinite=more(info.indefinite, ~made.convex),
    )
