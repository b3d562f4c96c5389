"""What :func:`gradxform.minimize` returns."""

import enum
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradxform import tree
from gradxform.bounds import box_of, sides
from gradxform.info import total
from gradxform.inverse import inverse_hessian


class Status(enum.IntEnum):
    """Why :func:`minimize` stopped."""

    converged = 0  #: the gradient is small enough, or a stop rule says so
    max_steps = 1  #: ``max_steps`` updates were made
    stalled = 2  #: a search failed, or the updates no longer move the parameters
    non_finite = 3  #: the value or the gradient is NaN or infinite, and the method cannot recover
    unbounded = 4  #: the value falls without bound
    at_precision = 5  #: rounding of the value hides any further decrease, which is a success
    stopped = 6  #: a target or budget was reached, your own rule holds, or ``progress`` said so
    at_bound = 7  #: converged or at_precision, with a parameter at one of its bounds, a success


_IN_WORDS = {
    Status.converged: "converged",
    Status.max_steps: "stopped at max_steps",
    Status.stalled: "stalled: no step lowers the value any further",
    Status.non_finite: "stopped at a value or gradient that is NaN or infinite",
    Status.unbounded: "unbounded: the value falls without bound",
    Status.at_precision: "at the precision of {dtype}: rounding hides any further decrease",
    Status.stopped: "stopped by a rule, a budget or progress",
    Status.at_bound: "converged, with {held} of the parameters at a bound",
}


# a bound on the gradient beyond this size is none: a stop rule takes its place
_UNBOUNDED = 1e30


class History(NamedTuple):
    """The last accepted points of a run, oldest first; see ``history`` of :func:`minimize`.

    If there are fewer points than asked for, the entries from ``count`` on repeat the last one.
    """

    value: jax.Array  #: the objective
    grad_norm: jax.Array  #: largest absolute gradient entry, without frozen leaves
    evaluations: jax.Array  #: evaluations of value and gradient made so far
    count: jax.Array  #: number of points


class Solution(NamedTuple):
    """The result of :func:`minimize`, in arrays. ``print`` shows a report."""

    params: tree.PyTree  #: the best point, or the last one; see ``returned`` of :func:`minimize`
    value: jax.Array  #: the objective at ``params``
    grad_norm: jax.Array  #: largest absolute gradient entry at ``params``, without frozen leaves
    steps: jax.Array  #: number of updates
    evaluations: jax.Array  #: number of evaluations of value and gradient
    curvature_products: jax.Array  #: number of Hessian-vector products
    status: jax.Array  #: why the run stopped, a :class:`Status`
    aux: tree.PyTree  #: with ``has_aux``: the second part of the objective's result at ``params``
    tol: jax.Array  #: the bound on the gradient; the largest number with a rule of your own
    max_steps: jax.Array  #: ``max_steps`` of the call
    history: History | None  #: the last accepted points, if ``history`` asks for them
    loop: Any  #: the state of the loop, for ``resume``

    @property
    def converged(self) -> jax.Array:
        """Whether the run succeeded, as ``converged``, ``at_bound`` or ``at_precision``."""
        successes = Status.converged, Status.at_bound, Status.at_precision
        return functools.reduce(operator.or_, (self.status == status for status in successes))

    @property
    def active_bounds(self) -> tree.PyTree:
        """For each entry of ``params`` −1 at its lower bound, 1 at the upper one, otherwise 0."""
        box = None if self.loop is None else box_of(self.loop.state, self.params)
        if box is None:
            return jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.int8), self.params)
        return sides(box, self.params)

    def inverse_hessian(self, vector: tree.PyTree) -> tree.PyTree:
        """H v, where H is the inverse Hessian that the method has learnt along its path.

        :func:`gradxform.bfgs`, :func:`gradxform.lbfgs` and searches along their directions learn
        it. H is symmetric and positive definite, and exact only along the steps that were made;
        before the first step it is the identity. Use it to start another method or to precondition.
        For error bars take :func:`gradxform.covariance`, which computes the exact inverse.

        H belongs to the gradients that the method saw: a link before it in a chain that scales
        them scales H. For parameters that a mask hides from the method, H is 0. Under
        ``jax.vmap`` map over the solution and the vector.

        Args:
          vector: v, a pytree with the structure and shapes of ``params``.

        Returns:
          A pytree like ``params``, in at least float32.

        Raises:
          ValueError: the method learns no inverse Hessian, or ``vector`` is not like ``params``.

        >>> import jax.numpy as jnp, gradxform as gx
        >>> bowl = lambda x: x[0] ** 2 + 2 * x[1] ** 2  # the Hessian has 2 and 4 on its diagonal
        >>> solution = gx.minimize(bowl, jnp.ones(2), gx.bfgs())
        >>> solution.inverse_hessian(jnp.ones(2)).round(2)
        Array([0.5 , 0.25], dtype=float32)
        """
        if jnp.ndim(self.status):
            raise ValueError(
                f"inverse_hessian: the solution holds {jnp.size(self.status)} runs of a jax.vmap: "
                "map over it, jax.vmap(lambda s, v: s.inverse_hessian(v))(solution, vector)"
            )
        return inverse_hessian(self.loop.state, self.params, vector)

    def __str__(self) -> str:
        lanes = np.asarray(self.status)
        if lanes.ndim:
            counts = (f"{np.sum(lanes == s)} {s.name}" for s in Status if np.any(lanes == s))
            return f"{lanes.size} solves: {', '.join(counts)}"
        bound = f"{float(self.tol):.2e}" if self.tol < _UNBOUNDED else ""
        rows = (
            ("value", f"{float(self.value):.6g}", ""),
            ("gradient, largest entry", f"{float(self.grad_norm):.2e}", bound),
            ("steps", f"{int(self.steps)}", f"{int(self.max_steps)}"),
            ("evaluations", f"{int(self.evaluations)}", ""),
            ("curvature products", f"{int(self.curvature_products)}", ""),
        )
        held = sum(int(np.sum(x != 0)) for x in jax.tree.leaves(self.active_bounds))
        lines = [_IN_WORDS[Status(int(lanes))].format(dtype=self.value.dtype, held=held)]
        lines += [
            f"  {name:24}{value:>14}" + (f"   (at most {bound})" if bound else "")
            for name, value, bound in rows
        ]
        seen = 0 if self.loop is None else int(total(self.loop.state, "indefinite"))
        if seen:
            lines += [f"  not convex in the outputs of the model, as seen in {seen} updates"]
        return "\n".join(lines)
