"""Physics-informed nets: the reference solution, the residuals, and a small race."""

import csv
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
import gradxform.lab as lab
from gradxform.lab.data.equations import burgers, burgers_points
from gradxform.lab.data.sets import load
from gradxform.lab.experiment.folders import FolderError
from gradxform.lab.experiment.load import ConfigError, parse_config, to_toml
from gradxform.lab.report import files
from gradxform.lab.report.folder import write_atomically
from gradxform.lab.tasks.models import ModelError
from gradxform.lab.tasks.physics import VISCOSITY, burgers_residual, physics_task, solution
from gradxform.lab.tasks.task import Batch, objective
from gradxform.lab.training.epoch import evaluate, to_device
from gradxform.lab.training.race import race
from gradxform.squares import squares_of

SMALL = {"hidden": [5, 4], "points": 64, "viscosity": 0.05}


def trial(**changes):
    table = {
        "name": "trial",
        "task": {"kind": "physics", **SMALL},
        "training": {"epochs": 15, "batch_size": "full", "order": "sequential"},
        "optimizers": {
            "lm": {"method": "levenberg_marquardt"},
            "gd": {"method": "sgd", "learning_rate": 1e-3},
        },
    }
    return parse_config(table | changes)


@pytest.fixture
def task(x64):
    return physics_task(load("burgers"), **SMALL)


def batch_of(task):
    return Batch(jnp.asarray(task.train.x), jnp.asarray(task.train.y), jnp.ones(SMALL["points"]))


def test_the_steepest_slope_is_the_published_one():
    # Basdevant et al. (1986), table 1: |u_x| at x = 0 is largest at πt = 1.6037
    h, t = 1e-4, 1.6037 / math.pi
    left, right = burgers(np.array([[t, -h], [t, h]]), 0.01 / math.pi)
    third = 2 * (burgers(np.array([[t, 2 * h]]), 0.01 / math.pi)[0] - 2 * right) / (2 * h)
    assert (right - left) / (2 * h) - third / 6 == pytest.approx(-152.00516, rel=1e-5)


@pytest.mark.parametrize("viscosity", [VISCOSITY, 0.05])
def test_the_reference_satisfies_the_equation(viscosity):
    rng = np.random.default_rng(0)
    points = rng.uniform([0.05, 0.05], [1.0, 0.95], (50, 2)) * rng.choice([-1, 1], (50, 1))
    points[:, 0] = np.abs(points[:, 0])
    h = 1e-3 * np.eye(2)
    at = lambda shift: burgers(points + shift, viscosity)
    u, (u_t, u_x) = at(0), [(at(s) - at(-s)) / 2e-3 for s in h]
    u_xx = (at(h[1]) - 2 * u + at(-h[1])) / 1e-6
    size = np.abs(u_t) + np.abs(u * u_x) + viscosity * np.abs(u_xx)
    assert np.max(np.abs(u_t + u * u_x - viscosity * u_xx) / size) < 1e-3


def test_the_reference_starts_as_the_equation_says_and_is_odd():
    x = np.linspace(-1, 1, 21)
    grid = lambda t: np.stack([np.full_like(x, t), x], axis=1)
    np.testing.assert_allclose(burgers(grid(0.0), VISCOSITY), -np.sin(np.pi * x), atol=1e-14)
    u = burgers(grid(0.7), VISCOSITY)
    np.testing.assert_allclose(u, -u[::-1], atol=1e-13)
    np.testing.assert_allclose(u[[0, -1]], 0, atol=1e-12)


def test_every_beginning_of_the_points_is_spread():
    x = burgers_points()[0].x
    for count in (64, 500, 2048):
        times, places = x[:count].T
        assert abs(times.mean() - 0.5) < 0.02
        assert np.histogram(times, 8, (0, 1))[0].min() > 0.9 * count / 8
        # half of them evenly, the others such that |x| < 1/8 has a half of them, at all times
        for quarter in range(4):
            near = np.abs(places[np.floor(4 * times) == quarter]) < 1 / 8
            assert np.mean(near) == pytest.approx(0.5 * (1 / 8 + 1 / 2), abs=0.1)


def test_the_residual_of_a_standing_wave_is_zero(x64):
    wave = lambda point: -jnp.tanh(point[1] / (2 * 0.1))
    points = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (20, 2)))
    found = jax.vmap(lambda point: burgers_residual(wave, point, 0.1))(points)
    np.testing.assert_allclose(found, 0, atol=1e-13)
    assert np.min(np.abs(jax.vmap(lambda p: burgers_residual(wave, p, 0.2))(points))) > 1e-5


def test_the_net_meets_the_conditions_exactly(task):
    params = task.init(jax.random.key(0))
    u = lambda t, x: float(solution(params, jnp.asarray([t, x]), hidden=SMALL["hidden"]))
    assert u(0.0, 0.3) == pytest.approx(-math.sin(0.3 * math.pi), abs=1e-15)
    assert u(0.4, 1.0) == pytest.approx(0, abs=1e-15)
    assert u(0.4, -1.0) == pytest.approx(0, abs=1e-15)
    assert abs(u(0.5, 0.5) + 1) > 1e-3


def test_the_objective_is_a_sum_of_squares_in_both_forms(task):
    params, batch, key = task.init(jax.random.key(1)), batch_of(task), jax.random.key(0)
    plain, curved = (objective(task, batch, key, for_curvature=c) for c in (False, True))
    assert squares_of(plain) is not None

    @jax.jit
    def found(params):
        loss = task.loss(task.model(params, batch.x, key), batch.x, batch.y, batch.weight)
        products = [gx.gauss_newton()(fn, params)(params) for fn in (plain, curved)]
        return loss, [plain(params), curved(params)], products

    loss, values, products = found(params)
    np.testing.assert_allclose(values, float(loss), rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-12), *products)


def test_examples_of_weight_zero_do_not_count(task):
    params, batch, key = task.init(jax.random.key(1)), batch_of(task), jax.random.key(0)
    half = SMALL["points"] // 2
    some = batch._replace(weight=batch.weight.at[half:].set(0))
    first = Batch(*(x[:half] for x in batch))
    values = [float(objective(task, part, key)(params)) for part in (some, first)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_the_relative_error_is_that_of_the_grid(task):
    params = task.init(jax.random.key(0))
    found = evaluate(task, params, to_device(task.test))["relative_error"]
    u = jax.vmap(lambda point: solution(params, point, hidden=SMALL["hidden"]))(task.test.x)
    exact = burgers(task.test.x, SMALL["viscosity"])
    expected = np.linalg.norm(u - exact) / np.linalg.norm(exact)
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_more_points_than_there_are_is_an_error():
    with pytest.raises(ModelError, match="points=100000: there are 32768"):
        physics_task(load("burgers"), points=100_000)


@pytest.mark.parametrize("hidden", [[], 20, [20, 0], [2.5]])
def test_bad_widths_are_refused(hidden):
    with pytest.raises(ConfigError, match=r"task\.hidden: .*a list of whole numbers from 1"):
        trial(task={"kind": "physics", "hidden": hidden})


def test_a_race_runs_in_float64_and_draws_its_pictures(tmp_path):
    config, rows = trial(), []
    result = race(config, load("burgers"), lambda label, row: rows.append((label, row)))
    assert not jax.config.jax_enable_x64
    fitted, descended = result.histories
    assert {x.dtype for x in jax.tree.leaves(fitted.params)} == {np.dtype("float64")}
    first, last = fitted.rows[0], fitted.rows[-1]
    assert last["train_loss"] < min(0.3 * first["train_loss"], descended.rows[-1]["train_loss"])
    assert last["test_relative_error"] < 0.5 * first["test_relative_error"]
    files.save(tmp_path, config, result)
    for name in ("error.png", "solution.png", "work.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    metrics = files.metrics_csv(rows)
    assert "test_relative_error" in next(csv.reader(metrics.splitlines()))

    write_atomically(tmp_path / "config.toml", to_toml(config))
    write_atomically(tmp_path / "metrics.csv", metrics)
    drawn, expected = lab.plot(tmp_path), lab.plot(result, config)
    assert set(drawn) == set(expected) == {"cost", "work", "error", "solution"}
    for one, other in zip(drawn["solution"].axes, expected["solution"].axes, strict=True):
        assert one.get_title() == other.get_title()
        for mine, theirs in zip(one.collections, other.collections, strict=True):
            np.testing.assert_array_equal(mine.get_array(), theirs.get_array())
    head, _, *rest = (tmp_path / "solution.csv").read_text().splitlines()
    for lines in ([head, *rest], [head, "0.0,-1.0,nan,0.0", *rest], [head]):
        (tmp_path / "solution.csv").write_text("\n".join(lines))
        with pytest.raises(FolderError, match=r"solution\.csv"):
            lab.load_run(tmp_path)
