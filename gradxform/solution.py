"""What :func:`gradxform.minimize` returns."""

import enum
from typing import Any, NamedTuple

import jax
import numpy as np

from gradxform import tree


class Status(enum.IntEnum):
    """Why :func:`minimize` stopped."""

    converged = 0  #: the gradient of what moves is small enough, or the last point is at rest
    max_steps = 1  #: ``max_steps`` updates were made
    stalled = 2  #: a search failed, or the updates no longer move the parameters
    non_finite = 3  #: the value or the gradient is NaN or infinite, and the method has no remedy
    unbounded = 4  #: the value falls without end


_IN_WORDS = {
    Status.converged: "converged",
    Status.max_steps: "stopped at max_steps",
    Status.stalled: "stalled: no step descends any further",
    Status.non_finite: "stopped at a value or gradient that is not finite",
    Status.unbounded: "unbounded: the value falls without end",
}


class Solution(NamedTuple):
    """What :func:`minimize` found, in arrays. ``print`` shows a report."""

    params: tree.PyTree  #: the best point seen, or the last one; see ``returned``
    value: jax.Array  #: the objective there
    grad_norm: jax.Array  #: the largest absolute entry of its gradient there, frozen leaves apart
    steps: jax.Array  #: updates made
    evaluations: jax.Array  #: value-and-gradient evaluations
    curvature_products: jax.Array  #: Hessian-vector products
    status: jax.Array  #: a :class:`Status`
    aux: tree.PyTree  #: what the objective returned beside its value there, with ``has_aux``
    tol: jax.Array  #: the bound of ``grad_norm``
    max_steps: jax.Array  #: the bound of ``steps``
    loop: Any  #: where the loop stood, for ``resume``

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
