"""What :func:`gradxform.minimize` returns."""

import enum
from typing import Any, NamedTuple

import jax
import numpy as np

from gradxform import tree


class Status(enum.IntEnum):
    """Why :func:`minimize` stopped."""

    converged = 0  #: the gradient is small enough; with a penalty, the parameters stopped moving
    max_steps = 1  #: ``max_steps`` updates were made
    stalled = 2  #: a search failed, or the updates no longer move the parameters
    non_finite = 3  #: the value or the gradient is NaN or infinite, and the method cannot recover
    unbounded = 4  #: the value falls without bound


_IN_WORDS = {
    Status.converged: "converged",
    Status.max_steps: "stopped at max_steps",
    Status.stalled: "stalled: no step lowers the value any further",
    Status.non_finite: "stopped at a value or gradient that is NaN or infinite",
    Status.unbounded: "unbounded: the value falls without bound",
}


def succeeded(status: jax.Array) -> jax.Array:
    """Whether the run found a point where the gradient is small enough."""
    return status == Status.converged


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
    tol: jax.Array  #: ``tol`` of the call
    max_steps: jax.Array  #: ``max_steps`` of the call
    loop: Any  #: the state of the loop, for ``resume``

    def __str__(self) -> str:
        lanes = np.asarray(self.status)
        if lanes.ndim:
            counts = (f"{np.sum(lanes == s)} {s.name}" for s in Status if np.any(lanes == s))
            return f"{lanes.size} solves: {', '.join(counts)}"
        rows = (
            ("value", f"{float(self.value):.6g}", ""),
            ("gradient, largest entry", f"{float(self.grad_norm):.2e}", f"{float(self.tol):.2e}"),
            ("steps", f"{int(self.steps)}", f"{int(self.max_steps)}"),
            ("evaluations", f"{int(self.evaluations)}", ""),
            ("curvature products", f"{int(self.curvature_products)}", ""),
        )
        lines = [_IN_WORDS[Status(int(lanes))]]
        lines += [
            f"  {name:24}{value:>14}" + (f"   (at most {bound})" if bound else "")
            for name, value, bound in rows
        ]
        return "\n".join(lines)
