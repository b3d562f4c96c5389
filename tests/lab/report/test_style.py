"""The methods' colours and markers: one for each, and told apart without colour."""

import itertools

import numpy as np
import pytest

from gradxform.lab.experiment import catalogue
from gradxform.lab.experiment.load import find_config, load_config
from gradxform.lab.report.style import (
    COLOURS,
    DASHES,
    METHODS,
    MOST_ALIKE,
    in_words,
    lightness,
    method_of,
    styles,
    styles_of,
)

# What eyes without one kind of cone see (Machado, Oliveira & Fernandes 2009), in linear RGB.
EYES = {
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def lab(colour, eye):
    """The colour as it looks to an eye, in CIE's L*a*b*, where distances are alike."""
    rgb = np.asarray([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(EYES[eye] @ linear, 0, 1) / np.asarray([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.asarray([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_every_method_of_the_package_has_a_style():
    names = {found.name.removeprefix("gradxform.") for found in catalogue.methods("gradxform")}
    wrappers = {"polyak_average", "rounded_stochastically", "with_line_search"}
    assert {name.removeprefix("scale_by_") for name in names - wrappers} == set(METHODS)


FIRST_ORDER = list(METHODS)[: list(METHODS).index("newton")]


def differences(one, other):
    """In how many ways the lines of two methods differ without colour."""
    a, b = METHODS[one].style, METHODS[other].style
    apart = abs(lightness(a.color) - lightness(b.color)) >= 10
    return apart + (a.linestyle != b.linestyle) + (a.marker != b.marker)


def test_any_two_methods_differ_without_colour():
    for one, other in itertools.combinations(METHODS, 2):
        a, b = METHODS[one].style, METHODS[other].style
        assert (a.linestyle, a.marker) != (b.linestyle, b.marker), (one, other)
        assert a[:2] != b[:2], (one, other)


def test_methods_of_one_family_differ_twice():
    """Second-order methods are often compared with SGD and Adam too."""
    second_order = [*(name for name in METHODS if name not in FIRST_ORDER), "sgd", "adam"]
    for family in (FIRST_ORDER, second_order):
        for one, other in itertools.combinations(family, 2):
            assert differences(one, other) >= 2, (one, other)


def test_lightness_is_that_of_a_grey_print():
    assert lightness("#000000") == 0
    assert lightness("#FFFFFF") == pytest.approx(100)
    assert lightness("#777777") == pytest.approx(50, abs=0.1)


@pytest.mark.parametrize("eye", EYES)
def test_the_colours_differ_for_every_eye(eye):
    for one, other in itertools.combinations(COLOURS, 2):
        assert np.linalg.norm(lab(one, eye) - lab(other, eye)) > 15, (one, other)


def test_neighbouring_colours_differ_in_grey():
    for one, other in itertools.pairwise(COLOURS):
        assert abs(lightness(one) - lightness(other)) > 10


def test_labels_of_one_method_share_its_colour_and_marker():
    labels = ["newton_cg, Hessian", "newton_cg, Gauss-Newton", "Newton-CG", "adam"]
    first, second, third, adam = styles_of(labels).values()
    assert first == METHODS["newton_cg"].style
    assert adam == METHODS["adam"].style
    assert {style.marker for style in (first, second, third)} == {first.marker}
    assert [style.fillstyle for style in (first, second, third)] == ["full", "none", "none"]
    assert len({str(style.linestyle) for style in (first, second, third)}) == 3
    assert len({lightness(style.color) for style in (first, second, third)}) == 3


def test_many_labels_of_one_method_are_told_apart_by_colour():
    labels = [f"batch {2**i}" for i in range(MOST_ALIKE + 1)]
    found = styles_of(labels, {label: {"method": "sgd"} for label in labels})
    assert list(found.values()) == styles(len(labels))


def test_other_labels_have_styles_that_no_method_has():
    of_methods = {method.style[:2] for method in METHODS.values()}
    assert not of_methods & {style[:2] for style in styles(40)}
    without_colour = [(str(s.linestyle), s.marker) for s in styles(24)]
    without_colour += [(str(m.style.linestyle), m.style.marker) for m in METHODS.values()]
    assert len(set(without_colour)) == len(without_colour)
    assert styles_of(["mine", "adam", "yours"])["yours"] == styles(2)[1]


@pytest.mark.parametrize(
    ("label", "table", "method"),
    [
        ("fast", {"method": "adam"}, "adam"),
        ("adam", {"method": "gradxform.sgd"}, "sgd"),
        ("x", {"chain": [{"method": "optax.clip"}, {"method": "scale_by_adam"}]}, "adam"),
        ("x", {"method": "with_line_search", "direction": {"method": "scale_by_newton"}}, "newton"),
        ("sgd", {"method": "optax.contrib.muon"}, None),
        ("L-BFGS", None, "lbfgs"),
        ("gradient descent", None, "sgd"),
        ("SGD, ε = 0.02", None, "sgd"),
        ("Newton–CG", None, "newton_cg"),
        ("RMSProp + Nesterov", None, "rmsprop"),
        ("Newton with a search", None, "newton"),
        ("my adam", None, None),
        ("", None, None),
    ],
)
def test_the_method_of_a_label(label, table, method):
    assert method_of(label, table) == method


def test_legends_name_methods_in_words_and_leave_other_labels():
    assert in_words("delta_bar_delta") == "delta-bar-delta"
    assert in_words("rmsprop + nesterov") == "RMSProp + Nesterov"
    for label in ("my_adam", "adam 2", "", "_$x_", "newtons"):
        assert in_words(label) == label
    for name in METHODS:
        assert method_of(METHODS[name].words) == name


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in find_config("valley").parent.glob("*.toml"))
)
def test_the_shipped_configs_need_no_colour(name):
    config = load_config(name)
    found = list(styles_of(config.optimizers, config.optimizers).values())
    for a, b in itertools.combinations(found, 2):
        assert (a.linestyle, a.marker, a.fillstyle) != (b.linestyle, b.marker, b.fillstyle)
    assert all(style.linestyle in DASHES for style in found)
