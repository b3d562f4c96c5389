"""What the Kronecker methods share: the batch of an update, its sub-batches, and the counts."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradxform import protocol, tree
from gradxform.hyperparameters import Scalar, scalar
from gradxform.objective import Composed, bind, check_value
from gradxform.second_order import kronecker_factors as kf
from gradxform.second_order import random_passes as passes
from gradxform.second_order.joined_leaves import joined

_SHARE = 16  # the part of a large batch that is enough is one in so many examples
_FEWEST = 8  # examples in a part, and then the outputs in it and the largest number of examples
_FOR_FACTORS = 640, 64  # which are means over many updates
_FOR_MODEL = 2560, 256  # fewer may lack the examples that curve the objective
_HALF_IS_ENOUGH = 128  # examples, in a small batch


class Batch(NamedTuple):
    """What an update gets."""

    method: str
    params: tree.PyTree
    value: jax.Array
    value_fn: Composed
    g: tree.PyTree  # the gradient in at least float32
    finite: jax.Array  # whether value and gradient are

    def for_factors(self, size: int | None) -> passes.Part:
        """Examples spread evenly over the batch: ``size`` of them, or the default number."""
        return self._part("factor_batch_size", size, *_FOR_FACTORS)

    def for_model(self, size: int | None) -> passes.Part:
        """The same for the quadratic model."""
        return self._part("model_batch_size", size, *_FOR_MODEL)

    def _part(self, argument: str, size: int | None, outputs: int, most: int) -> passes.Part:
        if size is None and not self.value_fn.has_examples:
            return passes.Part(self.value_fn, 1)
        n, chunks = self.value_fn.examples, self.value_fn.chunks
        if size is None:
            enough = math.ceil(outputs / _outputs_of_one(self.value_fn, self.params))
            most = min(most, max(n // 2, _HALF_IS_ENOUGH))
            size = _even(max(min(max(enough, _FEWEST), most), n // _SHARE), n, chunks)
        if size > n or size % chunks:
            raise ValueError(
                f"{self.method}({argument}={size}): the data have {n} examples in {chunks} "
                f"chunks: give at most {n}" + (f", and a multiple of {chunks}" * (chunks > 1))
            )
        return passes.Part(self.value_fn.spread(size), n / size)

    def linearised(self, part: passes.Part, is_sum: jax.Array) -> Callable[[], passes.Linear]:
        """The model and the loss of a part of the examples, linearised when it is called."""
        return lambda: passes.scaled(passes.linearised(part, self.params), part, is_sum)


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
    value_fn = _composed(method, value_fn)
    g = jax.tree.map(tree.promote, grads)
    finite = jnp.isfinite(value) & jnp.isfinite(tree.max_abs(joined(g)))
    params = jax.tree.map(tree.promote, params)
    return Batch(method, params, jnp.where(finite, value, 0), value_fn, g, finite)


def batch_at(method: str, g: tree.PyTree, params: tree.PyTree, value_fn: Any) -> Batch:
    """The batch inside the update of another method, whose value is not known."""
    params = jax.tree.map(tree.promote, params)
    return Batch(method, params, number(), _composed(method, value_fn), g, jnp.array(True))


def _composed(method: str, value_fn: Any) -> Composed:
    if isinstance(value_fn, Composed):
        return value_fn
    raise ValueError(
        f"{method} needs to know which part of value_fn is the loss and which is the model: "
        "pass value_fn=gx.compose(loss, model), where loss(model(params)) is the value"
    )


def _outputs_of_one(value_fn: Composed, params: tree.PyTree) -> int:
    """The number of outputs of the model for one example, such as classes or pixels."""
    shapes = jax.tree.leaves(jax.eval_shape(value_fn.parts()[1], params))
    leading = 1 if value_fn.chunks == 1 else 2
    of_examples = (x.size for x in shapes if math.prod(x.shape[:leading]) == value_fn.examples)
    return max(sum(of_examples) // value_fn.examples, 1)


def _even(least: int, n: int, chunks: int) -> int:
    """A number of examples from ``least`` on that divides n, if there is one below its double.

    Then each of several devices that share the data has its part of them.
    """
    size = next((k for k in range(least, min(2 * least, n + 1)) if n % k + k % chunks == 0), least)
    return min(math.ceil(size / chunks) * chunks, n)


def scale_of(
    batch: Batch, part: passes.Part, known: tuple[jax.Array, jax.Array], value: Callable[[], Any]
) -> tuple[jax.Array, jax.Array]:
    """Curvature along the first gradient, and whether the objective is a sum over the examples.

    Both are found once. Until then the curvature that is known is 0.
    """

    def found() -> tuple[jax.Array, jax.Array]:
        at = passes.linearised(part, batch.params)
        is_sum = passes.is_sum(at, part, scalar(value()))
        unit = passes.curvature_along(passes.scaled(at, part, is_sum), batch.g)
        return jnp.where(batch.finite, unit, 0), is_sum

    return kf.when(known[0] == 0, found, known)


def number(x: Scalar = 0.0) -> jax.Array:
    return jnp.array(scalar(x), copy=True)


def after(turn: jax.Array) -> jax.Array:
    """The turn after this one; turns never stop, where a count stays at its largest value."""
    return jnp.where(turn == jnp.iinfo(turn.dtype).max, 0, turn + 1)


def no_counts() -> dict[str, jax.Array]:
    """What the ``info`` of both methods holds before the first update."""
    counts = ("curvature_products", "inversions", "fallbacks", "non_finite", "indefinite")
    numbers = ("gradient_equivalents", "damping")
    zeros = {name: jnp.array(0, jnp.int32) for name in counts}
    return zeros | {name: number() for name in numbers}


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
