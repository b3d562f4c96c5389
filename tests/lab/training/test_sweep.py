"""The sweep: every member is the run that it would be alone, whatever happens to the others."""

import math

import jax
import numpy as np
import pytest

from gradxform.lab.data.sets import load
from gradxform.lab.experiment.grid import Axis, Member, members, substitute
from gradxform.lab.experiment.load import ConfigError, parse_config, sweep_members
from gradxform.lab.experiment.methods import build
from gradxform.lab.tasks.surfaces import SURFACES
from gradxform.lab.tasks.task import make_task
from gradxform.lab.training import blocks
from gradxform.lab.training.members import hyperparameters
from gradxform.lab.training.outcomes import best_points, points_of
from gradxform.lab.training.race import race_on_task
from gradxform.lab.training.surfaces import grid_of_starts, sweep_on_surface
from gradxform.lab.training.sweep import sweep, sweep_on_task
from tests.lab.training.test_race import dataset

SGD = {"method": "sgd", "learning_rate": 0.1}
RATES = (0.01, 0.1, 1.0, 1e38)
SHORT = {"epochs": 3, "batch_size": 16}


@pytest.fixture(scope="module")
def task():
    options = {"hidden": [3], "dropout": 0.0, "input_dropout": 0.0}
    return make_task(dataset(), "mlp", model_options=options, validation_split=0.2)


def run_of(task, rates=RATES, seeds=3, **options):
    runs = members({"sgd": SGD}, {"learning_rate": Axis(tuple(rates))}, {}, seeds=seeds)
    return sweep_on_task(task, {"sgd": SGD}, runs, **SHORT | options)


@pytest.fixture(scope="module")
def swept(task):
    """Four rates, of which one diverges, and three seeds: initial parameters and batches vary."""
    return run_of(task, vary="both")


def alone(task, table, seed, **options):
    (history,) = race_on_task(
        task, {"x": build(table, "x")}, seed=seed, **SHORT | options
    ).histories
    return history


@pytest.mark.parametrize(("rate", "seed"), [(0.01, 0), (1.0, 2)])
def test_a_member_is_the_run_that_it_would_be_alone(task, swept, rate, seed):
    number = swept.members.index(Member("sgd", {"learning_rate": rate}, seed))
    history = alone(task, substitute(SGD, {"learning_rate": rate}), seed)
    costs = [row["cost"] for row in history.rows]
    np.testing.assert_allclose(swept.costs[number], costs, rtol=1e-6)
    row, last = swept.rows[number], history.rows[-1]
    for metric in ("cost", "train_loss", "validation_loss", "validation_accuracy", "test_loss"):
        assert row[metric] == pytest.approx(last[metric], rel=1e-6)
    assert (row["steps"], row["epochs"], row["seed"]) == (last["step"], 3, seed)


def test_rows_are_a_tidy_table(swept):
    assert len(swept.rows) == len(swept.members) == 12
    assert swept.costs.shape == (12, 3)
    assert {tuple(row) for row in swept.rows} == {tuple(swept.rows[0])}
    assert list(swept.rows[0])[:3] == ["optimizer", "learning_rate", "seed"]
    assert sum(row["seconds"] for row in swept.rows) == pytest.approx(swept.seconds)


def test_a_diverged_member_is_marked_and_harms_no_other(task, swept):
    diverged = [row["diverged"] for row in swept.rows]
    assert diverged == [rate == 1e38 for rate in RATES for _ in range(3)]
    for row in swept.rows[-3:]:
        assert row["epochs"] < 3
        assert math.isfinite(row["validation_loss"])  # at the last finite parameters
    assert np.isnan(swept.costs[-3:, -1]).all()
    others = run_of(task, RATES[:3], vary="both")
    np.testing.assert_allclose(others.costs, swept.costs[:9], rtol=1e-6)


def test_blocks_are_the_whole(task, swept):
    blocks = run_of(task, vary="both", block_size=8)  # the second is half empty
    np.testing.assert_allclose(blocks.costs, swept.costs, rtol=1e-6)
    for mine, whole in zip(blocks.rows, swept.rows, strict=True):
        assert mine["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-6)


def test_members_are_divided_among_the_devices(task, swept, monkeypatch):
    assert len(jax.devices()) == 8
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    np.testing.assert_allclose(run_of(task, vary="both").costs, swept.costs, rtol=1e-5)


@pytest.mark.parametrize("vary", ["initialisation", "order"])
def test_a_seed_changes_what_it_should(task, swept, vary):
    result = run_of(task, (0.0, 1.0), seeds=2, vary=vary)
    still, moving = result.costs[:2], result.costs[2:]  # at rate 0 only the parameters count
    assert np.allclose(still[0], still[1], rtol=1e-5) == (vary == "order")
    assert not np.allclose(moving[0], moving[1], rtol=1e-3)
    both = swept.costs[6:8]  # at the same rate
    np.testing.assert_allclose(moving[0], both[0], rtol=1e-6)
    assert not np.allclose(moving[1], both[1], rtol=1e-3)


def test_only_the_better_points_pass_a_rung(task, swept):
    called = []
    result = run_of(
        task,
        vary="both",
        rungs=[1, 2],
        on_epoch=lambda label, epoch, rows: called.append((label, epoch, sorted(rows))),
    )
    ran = np.isfinite(result.costs)
    assert ran.sum(axis=1).tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, *ran.sum(axis=1)[9:].tolist()]
    assert [row["dropped"] for row in result.rows] == [True] * 6 + [False] * 3 + [True] * 3
    np.testing.assert_allclose(result.costs[ran], swept.costs[ran], rtol=1e-6)
    assert called == [("sgd", 1, [*range(12)]), ("sgd", 2, [*range(3, 9)]), ("sgd", 3, [6, 7, 8])]
    (best,) = best_points(result)
    assert (best.values, best.dropped) == ({"learning_rate": 1.0}, False)


def test_numbers_that_set_shapes_have_programs_of_their_own(task):
    rate = {"schedule": "optax.linear_schedule", "init_value": 0.1, "end_value": 1.0}
    table = {"method": "sgd", "learning_rate": rate | {"transition_steps": 1}}
    steps = Axis((1, 5))  # a Python number in Optax's signature
    axes = {"learning_rate.transition_steps": steps, "learning_rate.init_value": Axis((0.1, 0.2))}
    runs = members({"x": table}, axes, {})
    calls = []
    result = sweep_on_task(
        task, {"x": table}, runs, **SHORT, on_epoch=lambda *args: calls.append(len(args[2]))
    )
    assert calls == [2] * 6  # each of two programs
    assert [row["learning_rate.transition_steps"] for row in result.rows] == [1, 1, 5, 5]
    history = alone(task, substitute(table, runs[2].values), 0)
    np.testing.assert_allclose(result.costs[2], [row["cost"] for row in history.rows], rtol=1e-6)


def test_a_hyperparameter_does_not_hide_a_column():
    row = hyperparameters(Member("hessian_free", {"seed": 3, "damping": 1.0}, 0))
    assert row == {"optimizer": "hessian_free", "optimizer.seed": 3, "damping": 1.0}


def test_an_optimiser_can_have_settings_of_its_own(task, swept):
    result = run_of(task, vary="both", overrides={"sgd": {"epochs": 2}})
    assert result.costs.shape == (12, 2)
    np.testing.assert_allclose(result.costs, swept.costs[:, :2], rtol=1e-6)


def test_points_are_compared_by_the_mean_of_their_seeds(swept):
    points = points_of(swept)["sgd"]
    assert [point.values["learning_rate"] for point in points] == list(RATES)
    assert [point.failures for point in points] == [0, 0, 0, 3]
    assert points[-1].mean == math.inf
    losses = [row["validation_loss"] for row in points[0].rows]
    assert points[0].mean == pytest.approx(np.mean(losses))
    (best,) = best_points(swept)
    assert best == min(points, key=lambda point: point.mean)
    assert [swept.rows[n] for n in best.numbers] == list(best.rows)


def test_an_optimiser_that_always_diverges_has_no_best_point(swept):
    lost = swept._replace(members=swept.members[9:], rows=swept.rows[9:])
    assert best_points(lost) == ()


def test_all_that_cannot_be_built_is_told_at_once(task):
    bad = {"chain": [SGD, {"method": "rmsprop", "learning_rate": 0.1, "nesterov": True}]}
    tables = {"a": bad, "ok": SGD, "b": bad}
    with pytest.raises(ConfigError) as caught:
        sweep_on_task(task, tables, members(tables, {}, {}), **SHORT)
    told = [str(problem) for problem in caught.value.problems]
    assert [line.partition(".chain")[0] for line in told] == ["optimizers.a", "optimizers.b"]


def test_members_that_do_not_fit_are_told(task, monkeypatch):
    monkeypatch.setattr(blocks, "_memory", lambda mesh: 50.0)
    with pytest.raises(ConfigError, match=r"do not fit into .* GiB of memory"):
        run_of(task)
    monkeypatch.setattr(blocks, "_memory", lambda mesh: 5e3)
    with pytest.raises(ConfigError, match=r"sweep.block_size: 16 members at once take"):
        run_of(task, block_size=12)


# -- surfaces


def walk(name, tables, starts, **options):
    runs = members(tables, {}, {}, seeds=len(starts))
    options = {"max_steps": 500} | options
    return sweep_on_surface(SURFACES[name], tables, runs, starts=starts, **options)


def test_every_start_of_a_surface_is_minimised():
    tables = {"bfgs": {"method": "bfgs"}, "newton": {"method": "newton"}}
    called = []
    result = walk(
        "quadratic",
        tables,
        grid_of_starts(SURFACES["quadratic"], 3),
        on_epoch=lambda label, epoch, rows: called.append((label, epoch, len(rows))),
    )
    assert called == [("bfgs", 1, 9), ("newton", 1, 9)]
    assert all(row["solved"] and row["status"] == "converged" for row in result.rows)
    assert all(abs(row["x"]) < 1e-3 and abs(row["y"]) < 1e-3 for row in result.rows)
    assert (result.rows[0]["x0"], result.rows[0]["y0"]) == (-4.0, pytest.approx(-10 / 3))
    assert {row["steps"] for row in result.rows[9:] if row["x0"] or row["y0"]} == {1}
    first = result.rows[9]
    assert first["work"] == first["evaluations"] + first["curvature_products"]
    assert [point.label for point in best_points(result)] == ["newton", "bfgs"]


def test_the_end_on_a_saddle_is_no_solution():
    tables = {"newton": {"method": "newton_cg"}, "sgd": SGD}
    result = walk("saddle", tables, [(1.0, 0.0), (1.0, 1.0)], tol=1e-3)
    on_ridge = [row for row in result.rows if row["y0"] == 0.0 and row["optimizer"] == "sgd"]
    assert [(row["status"], row["solved"]) for row in on_ridge] == [("converged", False)]
    points = {point.label: point for point in best_points(result)}
    assert points["sgd"].failures == 1
    assert points["sgd"].mean == points["sgd"].rows[1]["work"]


def test_a_surface_that_is_left_is_told_by_its_status():
    result = walk("rosenbrock", {"sgd": substitute(SGD, {"learning_rate": 1.0})}, [(-1.2, 1.0)])
    assert result.rows[0]["status"] == "non_finite"
    assert not result.rows[0]["solved"]
    assert best_points(result) == ()


# -- configs


def experiment(**changes):
    base = {
        "name": "trial",
        "task": {"kind": "classification", "dataset": "digits", "model": "logistic"},
        "training": {"epochs": 1, "batch_size": 512},
        "optimizers": {"sgd": SGD},
        "sweep": {"seeds": 2, "axes": {"learning_rate": [0.1, 0.5]}},
    }
    return parse_config(base | changes)


def test_a_config_is_swept():
    config = experiment()
    result = sweep(config, load("digits"))
    assert [(row["learning_rate"], row["seed"]) for row in result.rows] == [
        (rate, seed) for rate in (0.1, 0.5) for seed in (0, 1)
    ]
    assert result.members == sweep_members(config)
    assert result.measure == "train_loss"
    assert [row["cost"] for row in sweep(config).rows] == [row["cost"] for row in result.rows]


@pytest.mark.parametrize(
    ("starts", "found"),
    [
        (None, [(-1.2, 1.0)]),
        ([[0.0, 0.5], [1.0, 2]], [(0.0, 0.5), (1.0, 2.0)]),
        ({"points": 2}, [(-1.0, 0.0), (1.0, 0.0), (-1.0, 2.0), (1.0, 2.0)]),
    ],
)
def test_the_starts_of_a_surface(starts, found):
    given = {} if starts is None else {"starts": starts}
    config = experiment(
        task={"kind": "surface", "surface": "rosenbrock"},
        training={"steps": 5},
        sweep={**given, "axes": {"learning_rate": [1e-4, 1e-3]}},
    )
    rows = sweep(config).rows
    assert [(row["x0"], row["y0"]) for row in rows] == found * 2


def test_a_config_without_a_sweep_is_told():
    with pytest.raises(ConfigError, match=r"sweep: missing, for instance \[sweep.axes\]"):
        sweep(experiment(sweep=None), load("digits"))


@pytest.mark.parametrize(
    ("training", "key"),
    [
        ({"epochs": 1, "max_seconds": 1.0}, "training.max_seconds"),
        (
            {"epochs": 1, "overrides": {"sgd": {"max_seconds": 1.0}}},
            "training.overrides.sgd.max_seconds",
        ),
    ],
)
def test_a_sweep_does_not_end_by_time(training, key):
    with pytest.raises(ConfigError, match=f"{key}: members train together"):
        sweep(experiment(training=training), load("digits"))


def test_a_member_that_ran_away_is_marked(task):
    tables = {"sgd": {"method": "sgd", "learning_rate": 0.1}}
    runs = members(tables, {"learning_rate": Axis((0.1, 1e6))}, {}, seeds=2)
    result = sweep_on_task(task, tables, runs, epochs=2, batch_size=16)
    assert [row["diverged"] for row in result.rows] == [False, False, True, True]
    assert all(math.isfinite(row["train_loss"]) for row in result.rows)
    (best,) = best_points(result)
    assert best.values == {"learning_rate": 0.1}
