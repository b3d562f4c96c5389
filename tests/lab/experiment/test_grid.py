"""The members of a sweep: axes read and checked, grids, random points, values put in place."""

import itertools
import math
import random

import pytest

from gradxform.lab.experiment import grid
from gradxform.lab.experiment.grid import Axis, Member, members, read_axes, substitute

SGD = {"method": "sgd", "learning_rate": 0.1}
CHAIN = {"chain": [{"method": "optax.clip", "max_delta": 1.0}, SGD]}
TABLES = {"sgd": SGD, "momentum": {"method": "momentum", "learning_rate": 0.1}, "chain": CHAIN}


def read(table):
    axes, problems = read_axes(table, "sweep.axes")
    assert not problems
    return axes


def told(table, tables=TABLES, overrides=None, samples=None):
    axes, problems = read_axes(table, "sweep.axes")
    own = {label: read(x) for label, x in (overrides or {}).items()}
    return [str(p) for p in (*problems, *grid.check(tables, axes, own, samples))]


def test_a_range_holds_its_ends_exactly():
    values = Axis(low=1e-3, high=0.7, is_log=True, points=5).values()
    assert (values[0], values[-1]) == (1e-3, 0.7)
    ratios = [b / a for a, b in itertools.pairwise(values)]
    assert max(ratios) / min(ratios) < 1 + 1e-4
    assert Axis(low=0.0, high=0.9, points=4).values() == (0.0, 0.3, 0.6, 0.9)


def test_rounding_never_leaves_the_range():
    axis = Axis(low=0.99999991, high=0.99999999, points=9)
    draws = [axis.draw(random.Random(seed)) for seed in range(20)]
    assert all(axis.low <= value <= axis.high for value in (*axis.values(), *draws))


def test_random_values_are_uniform_on_the_axis_scale():
    axis = Axis(low=1e-4, high=1.0, is_log=True)
    generator = random.Random(0)
    values = [axis.draw(generator) for _ in range(2000)]
    below = sum(value < 1e-2 for value in values) / len(values)
    assert 0.45 < below < 0.55
    assert {Axis((1.0, 2.0)).draw(generator) for _ in range(50)} == {1.0, 2.0}


def test_members_are_every_point_and_seed_of_every_optimiser():
    axes = read({"learning_rate": [0.1, 0.2], "momentum": [0.5, 0.9]})
    found = members(TABLES, axes, {}, seeds=2)
    assert len(found) == grid.count(TABLES, axes, {}, seeds=2) == 4 + 8 + 2
    assert found[0] == Member("sgd", {"learning_rate": 0.1}, 0)
    assert found[-1] == Member("chain", {}, 1)  # it has no such number outside its links
    points = {tuple(m.values.items()) for m in found if m.label == "momentum"}
    assert len(points) == 4


def test_an_override_adds_to_the_axes_or_replaces_one():
    axes = read({"learning_rate": [0.1, 0.2]})
    own = {"momentum": read({"learning_rate": [1.0], "momentum": [0.5, 0.9]})}
    found = members(TABLES, axes, own)
    values = [dict(m.values) for m in found if m.label == "momentum"]
    assert values == [{"learning_rate": 1.0, "momentum": m} for m in (0.5, 0.9)]
    assert grid.count(TABLES, axes, own) == len(found) == 5


def test_random_points_are_of_the_seed_and_of_the_label_alone():
    axes = read({"learning_rate": {"log": [1e-3, 1.0]}})

    def rates(tables, seed):
        found = members(tables, axes, {}, samples=5, seed=seed, seeds=2)
        return [m.values["learning_rate"] for m in found if m.label == "sgd"]

    assert rates(TABLES, 0) == rates({"sgd": SGD}, 0)
    assert rates(TABLES, 0) != rates(TABLES, 1)
    assert rates(TABLES, 0)[0] == rates(TABLES, 0)[1]  # both seeds of a point
    assert len(set(rates(TABLES, 0))) == 5
    assert grid.count(TABLES, axes, {}, samples=5, seeds=2) == 10 + 10 + 2


def test_values_reach_links_and_schedules():
    axes = read({"chain": {"1": {"learning_rate": [0.5]}}})
    (member,) = members({"chain": CHAIN}, axes, {})
    new = substitute(CHAIN, member.values)
    assert new["chain"][1]["learning_rate"] == 0.5
    assert CHAIN["chain"][1]["learning_rate"] == 0.1
    decay = {"schedule": "linear_decay", "init_value": 1.0, "end_value": 0.1, "transition_steps": 9}
    table = {"method": "sgd", "learning_rate": decay}
    axes = read({"learning_rate": {"init_value": [0.5, 2.0]}})
    assert not told({"learning_rate": {"init_value": [0.5]}}, {"sgd": table})
    (first, _) = members({"sgd": table}, axes, {})
    assert substitute(table, first.values)["learning_rate"]["init_value"] == 0.5


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ([], "found an empty list"),
        ({}, "found an empty table"),
        (0.1, "should be a list of numbers, or a range"),
        (["a"], "should be a list of numbers"),
        ([0.1, math.nan], "should be a list of numbers"),
        ([True], "should be a list of numbers"),
        ([0.1, 0.1], "lists a value twice"),
        ({"log": [0.1], "points": 3}, "should be a list of numbers, or a range"),
        ({"log": [0.1, 1.0], "point": 3}, "should be a list of numbers, or a range"),
        ({"log": [0.0, 1.0], "points": 3}, "the first should be below the second, both positive"),
        ({"linear": [1.0, 0.0], "points": 3}, "the first should be below the second"),
        ({"linear": [0.0, 1.0], "points": 1}, "should be a whole number of at least 2"),
        ({"linear": [0.0, 1.0], "points": 2.0}, "should be a whole number of at least 2"),
        ({"linear": [0.0, 1.0]}, "a range needs points = N, or sweep.samples"),
        ([-1.0], "should be at least 0 and finite, found -1.0 (optimiser sgd)"),
    ],
)
def test_an_axis_that_cannot_be_is_told(axis, words):
    (problem,) = told({"learning_rate": axis})
    assert problem.startswith("sweep.axes.learning_rate: ")
    assert words in problem


def test_a_number_that_no_optimiser_has_is_told():
    (problem,) = told({"learning_rat": [0.1]})
    assert problem == (
        "sweep.axes.learning_rat: no optimiser has such a number, did you mean 'learning_rate'?"
    )
    (problem,) = told({}, overrides={"sgd": {"momentum": [0.5]}})
    assert problem.startswith("sweep.overrides.sgd.momentum: sgd has no such number; it has ")
    (problem,) = told({}, overrides={"sdg": {"learning_rate": [0.5]}})
    assert problem == "sweep.overrides.sdg: no optimiser has this label, did you mean 'sgd'?"


def test_points_and_samples_exclude_each_other():
    grid_of = {"learning_rate": {"log": [0.1, 1.0], "points": 3}}
    (problem,) = told(grid_of, samples=5)
    assert "points are for a grid: leave them out" in problem
    assert not told({"learning_rate": {"log": [0.1, 1.0]}}, samples=5)
    assert not told({"learning_rate": [0.1, 1.0]}, samples=5)


def test_a_number_that_sets_shapes_is_listed():
    tables = {"lbfgs": {"method": "lbfgs"}}
    (problem,) = told({"memory_size": {"linear": [2, 8], "points": 3}}, tables)
    assert "takes whole numbers: list them" in problem
    assert not told({"memory_size": [2, 8]}, tables)
    assert told({"memory_size": [2.5]}, tables)


def test_an_optimiser_that_is_wrong_itself_is_not_told_twice():
    assert not told({"learning_rate": [0.1]}, {"x": {"method": "sdg", "learning_rate": 0.1}})
