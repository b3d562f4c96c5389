"""A fit with far more parameters than residuals, for ``benchmarks/fitting.py``.

The step of Gauss–Newton then lies in the span of the m gradients of the residuals, so a solver that
knows this needs an m × m matrix only. The model is a net with one hidden layer of tanh units,
fitted to noise.
"""

import functools
import importlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import gradxform as gx
from benchmarks.common import table, timed, turns

INPUTS, MOST = 99, 50  #: of the net; updates
TARGETS = {"float32": 1e-4, "float64": 1e-8}  #: of ‖r‖, relative to that at the start

Params = dict[str, jax.Array]
Residuals = Callable[[Params], jax.Array]


class Run(NamedTuple):
    """Where a solver arrived."""

    params: Any
    updates: Any


class Net(NamedTuple):
    """The problem in one precision."""

    residuals: Residuals
    start: Params
    norm: float  #: ‖r‖ at the start
    goal: float  #: the norm to reach


def make_net(m: int, n: int, precision: str) -> Net:
    random = np.random.default_rng(0)
    units = n // (INPUTS + 1)
    x = jnp.asarray(random.normal(size=(m, INPUTS)) / np.sqrt(INPUTS), precision)
    y = jnp.asarray(random.normal(size=m), precision)
    hidden, out = random.normal(size=(units, INPUTS)), random.normal(size=units)
    start = {"hidden": jnp.asarray(hidden, precision), "out": jnp.asarray(out, precision)}

    def residuals(p: Params) -> jax.Array:
        return jnp.tanh(x @ p["hidden"].T) @ p["out"] / np.sqrt(units).astype(precision) - y

    norm = float(jnp.linalg.norm(residuals(start)))
    return Net(residuals, start, norm, TARGETS[precision] * norm)


# -- the solvers


def _ours(net: Net) -> Callable[[], Run]:
    stop = gx.reached(0.5 * net.goal**2)

    def call() -> Run:
        found = gx.least_squares(net.residuals, net.start, stop=stop, max_steps=MOST)
        return Run(found.params, found.steps)

    return call


def _stepping(
    residuals: Callable[[Any], jax.Array],
    goal: float,
    start: tuple[Any, Any],
    step: Callable[[Any], Any],
) -> Callable[[], Run]:
    """Updates from Python until the goal is reached; the carry's first part is the parameters."""
    norm = jax.jit(lambda p: jnp.linalg.norm(residuals(p)))

    def call() -> Run:
        carry, updates = start, 0
        while updates < MOST and norm(carry[0]) > goal:
            carry, updates = step(carry), updates + 1
        return Run(carry[0], updates)

    return call


def _by_hand(net: Net) -> Callable[[], Run]:
    """What one would write: p = −Jᵀ (J Jᵀ + λ)⁻¹ r, and λ a tenth or ten times the last one."""
    flat, unravel = ravel_pytree(net.start)

    def residuals(p: jax.Array) -> jax.Array:
        return net.residuals(unravel(p))

    def step(p: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
        r, jacobian = residuals(p), jax.jacrev(residuals)(p)
        gram = jnp.matmul(jacobian, jacobian.T, precision="highest")
        gram = gram + damping * jnp.mean(jnp.diag(gram)) * jnp.eye(len(r), dtype=r.dtype)
        trial = p - jax.scipy.linalg.solve(gram, r, assume_a="pos") @ jacobian
        is_lower = jnp.sum(residuals(trial) ** 2) < jnp.sum(r**2)
        return jnp.where(is_lower, trial, p), damping * jnp.where(is_lower, 0.1, 10)

    compiled = jax.jit(step)
    damping = jnp.asarray(1e-3, flat.dtype)
    call = _stepping(residuals, net.goal, (flat, damping), lambda carry: compiled(*carry))

    def unravelled() -> Run:
        run = call()
        return run._replace(params=unravel(run.params))

    return unravelled


def _nlls_gram(net: Net) -> Callable[[], Run]:
    """Its default: the Cholesky factor of J Jᵀ + λ, with geodesic acceleration."""
    method = importlib.import_module("nlls_gram").LevenbergMarquardt(net.residuals)

    def call() -> Run:
        found = method.solve(net.start, max_steps=MOST, atol=net.goal)
        return Run(found.x, found.steps)

    return call


def _optimistix(net: Net) -> Callable[[], Run]:
    """Its Levenberg–Marquardt, with conjugate gradients on the normal equations."""
    optx, lx, eqx = (importlib.import_module(name) for name in ("optimistix", "lineax", "equinox"))
    # lineax tests every entry by itself, so zero as atol would never be reached, and 1e-3 at once
    grad = jax.grad(lambda p: 0.5 * jnp.sum(net.residuals(p) ** 2))(net.start)
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grad))
    atol = 1e-3 * largest * net.goal / net.norm
    linear = lx.Normal(lx.CG(rtol=1e-3, atol=atol, max_steps=len(net.residuals(net.start))))
    method = optx.LevenbergMarquardt(1e-3, 1e-3, linear_solver=linear)

    def fn(p: Params, args: Any) -> tuple[jax.Array, None]:
        return net.residuals(p), None

    shape = jax.eval_shape(net.residuals, net.start)
    state = method.init(fn, net.start, None, {}, shape, None, frozenset())
    step = eqx.filter_jit(
        lambda carry: method.step(fn, carry[0], None, {}, carry[1], frozenset())[:2]
    )
    return _stepping(net.residuals, net.goal, (net.start, state), step)


def _solvers(net: Net) -> dict[str, Callable[[], Run]]:
    found = {"gx.least_squares": _ours(net), "Gauss–Newton with J Jᵀ, by hand": _by_hand(net)}
    if importlib.util.find_spec("nlls_gram") is not None:
        found["nlls-gram LevenbergMarquardt"] = _nlls_gram(net)
    if importlib.util.find_spec("optimistix") is not None:
        found["Optimistix LM, CG"] = _optimistix(net)
    return found


# -- the comparison


def compare(m: int, n: int, precision: str, rounds: int) -> str:
    """The table of one precision."""
    with jax.enable_x64(precision == "float64"):
        net = make_net(m, n, precision)
        calls = _solvers(net)
        first = {name: timed(call) for name, call in calls.items()}  # compiles
        times = turns(calls, rounds, warm_up=0)
        norm = functools.partial(_relative, net)
        rows = []
        for name, (compiling, run) in first.items():
            seconds = statistics.median(times[name])
            updates, reached = int(run.updates), norm(run.params)
            shown = f"{1e3 * seconds:.0f}" if reached <= 1.01 * TARGETS[precision] else "not"
            row = [name, str(updates), f"{1e3 * seconds / updates:.1f}", shown, f"{reached:.1e}"]
            rows.append([*row, f"{compiling:.1f}"])
        head = ["solver", "updates", "ms per update", f"ms to {TARGETS[precision]:.0e}"]
        return table([*head, "‖r‖ / ‖r₀‖", "first call s"], rows)


def _relative(net: Net, params: Params) -> float:
    return float(jnp.linalg.norm(net.residuals(params))) / net.norm
