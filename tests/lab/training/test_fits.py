"""Curve fits: NIST's numbers, bounds, robust losses, and what is wrong told in a line."""

import csv
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
import gradxform.lab as lab
from gradxform.lab.data.formats import DataError
from gradxform.lab.experiment import registry
from gradxform.lab.experiment.load import to_toml
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.report.files import save
from gradxform.lab.report.fits import fit_of
from gradxform.lab.tasks.curves import CURVES, points_of, residuals_of
from gradxform.lab.tasks.models import ModelError

T = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
Y = [3.02, 1.81, 1.11, 0.66, 0.42, 0.24, 0.15]


@pytest.fixture(autouse=True)
def _nothing_registered() -> Iterator[None]:
    yield
    registry.forget()


def config(sections: dict | None = None, **changes):
    task = {"kind": "curve_fit", "model": "exponential", "data": {"t": T, "y": Y}, "x": "t"}
    table = {"name": "decay", "task": task | {"start": {"rate": -0.3}} | changes}
    return lab.load_config(table | (sections or {}))


def test_the_list_of_our_curves_is_complete():
    assert tuple(CURVES) == registry.OURS["curve"]


def test_nists_estimates_and_errors():
    shipped = lab.load_config("curve_fit")
    result = lab.race(shipped)
    with jax.enable_x64(True):
        fit = fit_of(shipped, result)
    assert fit.estimates == pytest.approx(
        {"limit": 238.94212918, "rate": 5.5015643181e-4}, rel=1e-8
    )
    assert fit.errors == pytest.approx({"limit": 2.7070075241, "rate": 7.2668688436e-6}, rel=1e-6)
    ends = [history.rows[-1]["value"] for history in result.histories]
    assert ends == pytest.approx([0.12455138894 / 2] * 3, rel=1e-8)
    assert [row["step"] for row in result.rows[:3]] == [0, 1, 2]


def test_a_fit_is_that_of_least_squares():
    given = config()
    (history,) = lab.race(given).histories
    with jax.enable_x64(True):
        points = points_of(given.task)
        fit = lab.race(given)
        curve = fit_of(given, fit).curve
        expected = gx.least_squares(residuals_of(curve, points), curve.start)
    for name, value in expected.params.items():
        np.testing.assert_allclose(history.params[name], value, rtol=1e-10)


def test_a_parameter_at_its_bound_counts_as_known():
    given = config(bounds={"rate": [-0.4, 0.0]})
    result = lab.race(given)
    with jax.enable_x64(True):
        fit = fit_of(given, result)
        free = config(model="exponential")
        assert fit_of(free, lab.race(free)).estimates["rate"] < -0.45
    assert (fit.estimates["rate"], fit.errors["rate"]) == (pytest.approx(-0.4), 0)
    assert fit.freedom == len(T) - 2
    # the other two are those of a straight line in exp(-0.4 t)
    design = np.stack([np.exp(-0.4 * np.array(T)), np.ones(len(T))], axis=1)
    best, (rest,), *_ = np.linalg.lstsq(design, Y)
    np.testing.assert_allclose([fit.estimates[k] for k in ("height", "offset")], best, rtol=1e-6)
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * rest / fit.freedom)
    np.testing.assert_allclose([fit.errors[k] for k in ("height", "offset")], errors, rtol=1e-6)


def test_an_outlier_counts_less_with_a_robust_loss():
    bad = [*Y[:3], 3.0, *Y[4:]]
    clean = config()
    found = {"clean": lab.race(clean).histories[0].params["height"]}
    for loss in ("linear", "cauchy"):
        given = config(data={"t": T, "y": bad}, loss=loss, loss_scale=0.02)
        found[loss] = lab.race(given).histories[0].params["height"]
    assert abs(found["cauchy"] - found["clean"]) < 0.05
    assert abs(found["linear"] - found["clean"]) > 0.3


def test_standard_deviations_are_weights():
    sigma = [1e-3, 1e-3, 1e-3, 1e3, 1e3, 1e3, 1e3]
    given = config(data={"t": T, "y": Y, "s": sigma}, sigma="s")
    (history,) = lab.race(given).histories
    values = [
        history.params["offset"] + history.params["height"] * np.exp(history.params["rate"] * t)
        for t in T[:3]
    ]
    np.testing.assert_allclose(values, Y[:3], atol=1e-4)


def test_a_curve_of_two_variables_of_ones_own(tmp_path):
    @lab.curve("plane")
    def plane(x, a=1.0, b=1.0, c=0.0):
        return a * x[:, 0] + b * x[:, 1] + c

    data = {"u": T, "v": [t * t for t in T], "y": [2 * t + 3 * t * t + 1 for t in T]}
    given = lab.load_config(
        {
            "name": "p",
            "task": {"kind": "curve_fit", "model": "plane", "data": data, "x": ["u", "v"]},
        }
    )
    result = lab.race(given)
    assert result.histories[0].params == pytest.approx({"a": 2.0, "b": 3.0, "c": 1.0}, abs=1e-8)
    assert set(lab.plot(result, given)) == {"cost"}  # no picture of two variables


def test_a_folder_holds_what_its_pictures_need(tmp_path):
    given = config()
    result = lab.race(given)
    (tmp_path / "config.toml").write_text(to_toml(given))
    from gradxform.lab.report.files import metrics_csv

    rows = [(h.label, row) for h in result.histories for row in h.rows]
    (tmp_path / "metrics.csv").write_text(metrics_csv(rows))
    with jax.enable_x64(True):
        save(tmp_path, given, result)
        with (tmp_path / "estimates.csv").open() as file:
            estimates = {row["parameter"]: float(row["estimate"]) for row in csv.DictReader(file)}
        assert estimates == result.histories[0].params
        told = json.loads((tmp_path / "summary.json").read_text())
        assert [row["parameter"] for row in told["estimates"]] == ["height", "rate", "offset"]
        assert lab.load_run(tmp_path).histories[0].params == pytest.approx(estimates)
        assert set(lab.plot(tmp_path)) == {"cost", "fit"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"start": {"rat": 1}}, "task.start.rat: exponential has no such parameter, did you mean"),
        ({"bounds": {"hight": [0, 1]}}, "task.bounds.hight: exponential has no such parameter"),
        ({"bounds": {"rate": [1, 0]}}, "task.bounds.rate: should be a pair of numbers, the lower"),
        ({"bounds": {"rate": [0.0, 1.0]}}, "task.start.rate: lies outside of task.bounds.rate"),
        ({"model": "exponentail"}, "task.model: should be 'line', 'power', .*did you mean 'expon"),
        ({"file": "a.csv"}, "task.file: give either file"),
        ({"loss": "hubr"}, "task.loss: should be 'linear', 'huber'"),
        ({"sections": {"sweep": {}}}, "sweep: "),
    ],
)
def test_what_is_wrong_with_a_config_of_a_fit(changes, told):
    with pytest.raises(ConfigError, match=told):
        config(**changes)


def test_what_is_wrong_with_points_or_a_curve():
    lab.curve("short")(lambda x, a=1.0: a * x[:3])
    lab.curve("broken")(lambda x, a=1.0: a / 0)
    lab.curve("open")(lambda x, a: a * x)
    cases = [
        (
            DataError,
            {"x": "z"},
            "task.data: task.x: there is no column 'z'; the columns are t, y",
        ),
        (DataError, {"data": {"t": T, "y": Y[1:]}}, "equally many numbers"),
        (DataError, {"data": {"t": T, "y": Y, "s": [0.0] * 7}, "sigma": "s"}, "should be above 0"),
        (ModelError, {"data": {"t": T[:3], "y": Y[:3]}}, "3 parameters of 3 points"),
        (ModelError, {"start": {"rate": 1e4}}, "not finite at the start, height = 1, rate = 10000"),
        (ModelError, {"model": "short", "start": {}}, r"one value for each of 7 points"),
        (
            ModelError,
            {"model": "broken", "start": {}},
            r"test_fits\.py, line \d+: ZeroDivisionError",
        ),
    ]
    for error, changes, told in cases:
        with pytest.raises(error, match=told):
            lab.race(config(**changes))
    with pytest.raises(ConfigError, match=r"task\.start\.a: missing: open has no start value"):
        config(model="open", start={})
    optimizers = {"optimizers": {"Adam": {"method": "adam"}}}
    with pytest.raises(ConfigError, match=r"optimizers\.Adam: adam keeps no bounds: take lbfgs"):
        lab.race(config(optimizers, bounds={"rate": [-1.0, 0.0]}))
    with pytest.raises(ConfigError, match="has no sweep: use gradxform run"):
        lab.sweep(config())


@pytest.mark.parametrize("function", [lambda x: x, lambda a: a, lambda x, step: x])
def test_functions_that_are_no_curves(function):
    with pytest.raises(ValueError, match=r"lab\.curve\(name='c'\): the function needs"):
        lab.curve("c")(function)


def test_bounded_methods_reach_the_same_minimum():
    optimizers = {
        name: {"method": name} for name in ("lbfgs", "trust_region", "levenberg_marquardt")
    }
    given = config({"optimizers": optimizers}, bounds={"height": [0.0, 2.5]})
    values = [history.rows[-1]["value"] for history in lab.race(given).histories]
    np.testing.assert_allclose(values, min(values), rtol=1e-5)
    assert jnp.asarray(0.0).dtype == jnp.float32  # float64 ends with the race
