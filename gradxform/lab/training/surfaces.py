"""Races and sweeps on a surface: a walk is one compiled program."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform.evaluation import eval_params
from gradxform.lab.experiment.experiment import Experiment
from gradxform.lab.experiment.grid import Member, Table
from gradxform.lab.experiment.load import require_sweep, sweep_members
from gradxform.lab.experiment.problems import ConfigError, Problem
from gradxform.lab.tasks.surfaces import Surface, surface_of
from gradxform.lab.training.members import hyperparameters
from gradxform.lab.training.outcomes import History, RaceResult, Row, SweepResult, ran_away
from gradxform.lab.training.programs import Group, groups_of
from gradxform.lab.training.race import QUICK, OnRow, Transformations
from gradxform.lab.training.settings import collecting
from gradxform.lab.training.sweep import OnEpoch
from gradxform.minimization import minimize
from gradxform.solution import Status


def race_down_surface(
    experiment: Experiment, data: None = None, on_row: OnRow | None = None, **_: Any
) -> RaceResult:
    """The race of a config whose task is a surface; see :func:`race`."""
    config: Any = experiment.config
    surface = surface_of(config.task.surface)
    options = {"start": config.task.start or surface.start, "steps": config.training.steps}
    return race_on_surface(surface, experiment.transformations, **options, on_row=on_row)


def race_on_surface(
    surface: Surface,
    transformations: Transformations,
    *,
    start: tuple[float, ...],
    steps: int,
    on_row: OnRow | None = None,
) -> RaceResult:
    """Walks down a surface with each transformation, from one start.

    A row contains ``step`` (0 is the start), ``value`` and the coordinates ``x0``, ``x1``, … of
    ``gradxform.eval_params``. The rows of a method that diverged end at the first point that is not
    finite.

    Args:
      surface: the function.
      transformations: the transformations by label.
      start: the common start.
      steps: number of updates.
      on_row: called with the label and each row.

    Raises:
      ConfigError: a transformation fails on a point.
    """
    point = jnp.asarray(start, jnp.float32)
    lows = [float(surface.fn(jnp.asarray(minimum, jnp.float32))) for minimum in surface.minima]
    low = min(lows, default=-math.inf)
    problems: list[Problem | str] = []
    programs = {}
    for label, tx in transformations.items():
        with collecting(problems, f"optimizers.{label}"):
            programs[label] = jax.jit(make_walk(surface.fn, tx, steps)).trace(point)
    if problems:
        raise ConfigError(surface.name, problems)

    def run(label: str) -> History:
        started = time.perf_counter()
        walk = programs[label].lower().compile()
        compiled = time.perf_counter()
        points, values = jax.device_get(jax.block_until_ready(walk(point)))
        seconds = time.perf_counter() - compiled
        if seconds < QUICK:
            again = time.perf_counter()
            jax.block_until_ready(walk(point))
            seconds = time.perf_counter() - again
        rows: list[Row] = []
        for step, (x, value) in enumerate(zip(points, values, strict=True)):
            rows.append({"step": step, "value": float(value)})
            rows[-1] |= {f"x{i}": float(coordinate) for i, coordinate in enumerate(x)}
            if on_row is not None:
                on_row(label, rows[-1])
            if not all(map(math.isfinite, rows[-1].values())):
                break
        lost = not all(map(math.isfinite, rows[-1].values()))
        diverged = lost or ran_away(rows[-1]["value"] - low, rows[0]["value"] - low)
        end = points[len(rows) - 1]
        return History(label, tuple(rows), diverged, steps / seconds, compiled - started, end)

    return RaceResult(surface.name, "value", tuple(run(label) for label in transformations), "")


def make_walk(
    fn: Callable[[jax.Array], jax.Array], tx: optax.GradientTransformation, steps: int
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """The path of a transformation down a function, as a pure function of the start.

    Args:
      fn: a function of a vector of length n.
      tx: the transformation.
      steps: number of updates.

    Returns:
      ``start -> (points (steps + 1, n), values (steps + 1,))``, including the start.

    >>> import gradxform as gx
    >>> walk = make_walk(lambda x: jnp.sum(x**2), gx.sgd(0.25), steps=2)
    >>> walk(jnp.asarray([8.0]))[1]
    Array([64., 16.,  4.], dtype=float32)
    """
    tx = optax.with_extra_args_support(tx)

    def walk(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(carry: tuple[jax.Array, Any], _: None) -> tuple[Any, jax.Array]:
            x, state = carry
            value, grads = jax.value_and_grad(fn)(x)
            updates, state = tx.update(grads, state, x, value=value, grad=grads, value_fn=fn)
            x = optax.apply_updates(x, updates)
            return (x, state), eval_params(state, x)

        _, points = jax.lax.scan(step, (start, tx.init(start)), length=steps)
        points = jnp.concatenate([start[None], points])
        return points, jax.vmap(fn)(points)

    return walk


_SOLVED = 1e-3  # tolerance above a surface's minimum; its saddles and plateaus are higher


def sweep_over_surface(
    config: Any, data: None = None, on_epoch: OnEpoch | None = None, **_: Any
) -> SweepResult:
    """The sweep of a config whose task is a surface; see :func:`sweep`."""
    table, surface = require_sweep(config).model_dump(), surface_of(config.task.surface)
    starts = table["starts"] or [config.task.start or surface.start]
    return sweep_on_surface(
        surface,
        config.optimizers,
        sweep_members(config),
        starts=grid_of_starts(surface, **starts) if isinstance(starts, dict) else starts,
        max_steps=config.training.steps,
        tol=table["tol"],
        on_epoch=on_epoch,
    )


def sweep_on_surface(
    surface: Surface,
    tables: Mapping[str, Table],
    members: Sequence[Member],
    *,
    starts: Sequence[Sequence[float]],
    max_steps: int,
    tol: float = 1e-4,
    on_epoch: OnEpoch | None = None,
) -> SweepResult:
    """Minimises a surface with every member; members of one optimiser share a vmapped program.

    A row contains ``optimizer``, its hyperparameters, the start ``x0``, ``y0``, and the best point
    ``x``, ``y`` of :func:`gradxform.minimize` with its ``value``. Then come the ``steps``,
    ``evaluations`` and ``curvature_products``, ``work`` (the sum of the latter two), the
    ``status``, and ``solved``: whether it converged to a minimum of the surface, not to a saddle.

    Args:
      surface: the function.
      tables: the tables of the optimisers, as in a config, by label.
      members: the runs, see :func:`gradxform.lab.experiment.grid.members`; a member's seed is the
        number of its start.
      starts: pairs of numbers.
      max_steps: the largest number of updates.
      tol: a run has converged when no gradient entry exceeds this.
      on_epoch: see :func:`sweep`.

    Returns:
      The result; members are compared by their work.

    Raises:
      ConfigError: an optimiser cannot be built or fails on a point.

    >>> from gradxform.lab.experiment.grid import Member
    >>> runs = [Member("newton", {}, 0), Member("newton", {}, 1)]
    >>> result = sweep_on_surface(
    ...     surface_of("quadratic"), {"newton": {"method": "newton"}}, runs,
    ...     starts=[(-4.6, -2.2), (1.0, 1.0)], max_steps=10,
    ... )
    >>> [(row["steps"], row["solved"]) for row in result.rows]
    [(1, True), (1, True)]
    """
    points = jnp.asarray(starts, jnp.float32)
    lowest = surface.lowest
    rows: dict[int, Row] = {}
    seconds = compile_seconds = 0.0

    problems: list[Problem | str] = []
    groups, programs = tuple(groups_of(tables, members)), []
    for group in groups:
        values = [[members[n].values[path] for path in group.paths] for n in group.members]
        arguments = (
            jnp.asarray(values, jnp.float32).reshape(len(values), len(group.paths)),
            points[jnp.asarray([members[n].seed for n in group.members])],
        )
        with collecting(problems, f"optimizers.{group.label}"):
            program = jax.jit(jax.vmap(_solver(surface, group, max_steps, tol)))
            programs.append((program.trace(*arguments), arguments))
    if problems:
        raise ConfigError(surface.name, problems)

    for group, (traced, arguments) in zip(groups, programs, strict=True):
        started = time.perf_counter()
        program = traced.lower().compile()
        compiled = time.perf_counter()
        found = jax.device_get(jax.block_until_ready(program(*arguments)))
        compile_seconds += compiled - started
        seconds += time.perf_counter() - compiled
        own = {}
        for lane, number in enumerate(group.members):
            end = {name: x[lane].item() for name, x in found.items()}
            status = Status(end.pop("status"))
            solved = status == Status.converged and end["value"] <= lowest + _SOLVED
            own[number] = {
                **hyperparameters(members[number]),
                **dict(zip(("x0", "y0"), map(float, starts[members[number].seed]), strict=True)),
                **end,
                "work": end["evaluations"] + end["curvature_products"],
                "status": status.name,
                "solved": solved,
            }
        rows |= own
        if on_epoch is not None:
            on_epoch(group.label, 1, own)
    ordered, costs = tuple(rows[i] for i in range(len(members))), np.empty((len(members), 0))
    unit = "evaluations and curvature products"
    name = surface.name
    return SweepResult(name, "work", unit, tuple(members), ordered, costs, seconds, compile_seconds)


def grid_of_starts(surface: Surface, points: int) -> tuple[tuple[float, float], ...]:
    """Starts on a square grid over the ``bounds`` of a surface, in the middles of equal cells.

    Args:
      surface: the surface.
      points: points per side.

    >>> grid_of_starts(surface_of("saddle"), 2)
    ((-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 1.0))
    """
    x, y = (
        [low + (high - low) * (i + 0.5) / points for i in range(points)]
        for low, high in surface.bounds
    )
    return tuple((a, b) for b in y for a in x)


def _solver(
    surface: Surface, group: Group, max_steps: int, tol: float
) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    def solve(values: jax.Array, start: jax.Array) -> dict[str, jax.Array]:
        tx = group.built(values)
        solution = minimize(surface.fn, start, tx, tol=tol, max_steps=max_steps)
        names = ("value", "steps", "evaluations", "curvature_products", "status")
        x, y = solution.params
        return {"x": x, "y": y} | {name: getattr(solution, name) for name in names}

    return solve
