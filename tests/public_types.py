"""What type checkers know of the public names; ``make check`` gives this file to two of them."""

from collections.abc import Callable
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformationExtraArgs as Transformation

import gradxform as gx

methods = [gx.sgd(0.1), gx.momentum(0.1), gx.nesterov(jnp.asarray(0.1)), gx.adam()]
assert_type(gx.adam(optax.constant_schedule(0.1), b1=0.9), Transformation)
assert_type(gx.rmsprop(0.1, momentum=0.9, nesterov=True), Transformation)
assert_type(gx.scale_by_adam(), Transformation)
assert_type(gx.bfgs(), Transformation)
assert_type(gx.newton_cg(curvature=gx.gauss_newton()), Transformation)
assert_type(gx.trust_region("steihaug"), Transformation)
assert_type(gx.with_line_search(gx.scale_by_lbfgs()), Transformation)
assert_type(gx.polyak_average(gx.sgd(0.1)), Transformation)
assert_type(gx.masked(gx.adam(0.1), {"w": True, "b": False}), Transformation)
assert_type(gx.accumulate(gx.sgd(0.1), 4), Transformation)

solution = gx.minimize(lambda x: jnp.sum(x**2), jnp.ones(2), gx.bfgs(), tol=1e-3)
assert_type(solution, gx.Solution)
assert_type(solution.value, jax.Array)
assert_type(gx.Status(int(solution.status)), gx.Status)
assert_type(solution.converged, jax.Array)
assert_type(solution.history, gx.History | None)
assert_type(gx.__version__, str)

schedule: Callable[..., Any] = gx.linear_decay(0.1, 0.01, 100)


def mistakes() -> None:
    """Each line is an error for a type checker: it reports a comment that is not needed."""
    gx.adamm(0.1)  # type: ignore[attr-defined]
    gx.adam(learning_rat=0.1)  # type: ignore[call-arg]
    gx.sgd("fast")  # type: ignore[arg-type]
