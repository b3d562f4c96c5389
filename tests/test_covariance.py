"""Covariances: NIST's certified standard deviations, textbook formulas, and what is refused."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from gradxform import tree
from tests.test_derivatives import finite_difference

exp = jnp.exp


class Certified(NamedTuple):
    """A nonlinear regression of NIST's Statistical Reference Datasets."""

    model: Callable[[Any, Any], Any]
    params: list[float]
    deviations: list[float]
    y: str
    x: str


NIST = {
    "MGH09": Certified(
        lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
        [0.19280693458, 0.19128232873, 0.12305650693, 0.13606233068],
        [0.011435312227, 0.19633220911, 0.080842031232, 0.090025542308],
        "0.1957 0.1947 0.1735 0.16 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246",
        "4.0 2.0 1.0 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625",
    ),
    "MGH10": Certified(
        lambda b, x: b[0] * exp(b[1] / (x + b[2])),
        [0.005609636471, 6181.3463463, 345.22363462],
        [0.00015687892471, 23.309021107, 0.78486103508],
        "34780.0 28610.0 23650.0 19630.0 16370.0 13720.0 11540.0 9744.0 8261.0 7030.0 "
        "6005.0 5147.0 4427.0 3820.0 3307.0 2872.0",
        "50.0 55.0 60.0 65.0 70.0 75.0 80.0 85.0 90.0 95.0 100.0 105.0 110.0 115.0 120.0 125.0",
    ),
    "Misra1a": Certified(
        lambda b, x: b[0] * (1 - exp(-b[1] * x)),
        [238.94212918, 0.00055015643181],
        [2.7070075241, 7.2668688436e-06],
        "10.07 14.73 17.94 23.93 29.61 35.18 40.02 44.82 50.76 55.05 61.01 66.4 75.47 81.78",
        "77.6 114.9 141.1 190.8 239.9 289.0 332.8 378.4 434.8 477.3 536.8 593.1 689.1 760.0",
    ),
    "Lanczos3": Certified(
        lambda b, x: sum(b[k] * exp(-b[k + 1] * x) for k in (0, 2, 4)),
        [0.086816414977, 0.95498101505, 0.84400777463, 2.9515951832, 1.5825685901, 4.9863565084],
        [
            0.017197908859,
            0.097041624475,
            0.041488663282,
            0.10766312506,
            0.058371576281,
            0.034436403035,
        ],
        "2.5134 2.0443 1.6684 1.3664 1.1232 0.9269 0.7679 0.6389 0.5338 0.4479 0.3776 "
        "0.3197 0.272 0.2325 0.1997 0.1723 0.1493 0.1301 0.1138 0.1 0.0883 0.0783 0.0698 "
        "0.0624",
        "0.0 0.05 0.1 0.15 0.2 0.25 0.3 0.35 0.4 0.45 0.5 0.55 0.6 0.65 0.7 0.75 0.8 0.85 "
        "0.9 0.95 1.0 1.05 1.1 1.15",
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NIST)
def test_standard_errors_are_those_that_nist_certifies(name: str) -> None:
    model, params, deviations, *columns = NIST[name]
    y, x = (np.asarray(column.split(), float) for column in columns)
    residuals = lambda b, x, y: model(b, x) - y
    found = gx.covariance(residuals, jnp.asarray(params), args=(x, y))
    np.testing.assert_allclose(jnp.sqrt(jnp.diag(found)), deviations, rtol=1e-8)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Times and measurements. JAX may remember the dtype of an array, so each test has its own."""
    t = np.linspace(0.0, 1.0, 12)
    return t, 1.5 + 0.5 * t + 0.1 * np.sin(50 * t)


ORDER = {"b": 0.5, "a": np.asarray([1.5, 0.1])}  # ravelled, a comes first


def bent(p: Any, t: Any, y: Any) -> dict[str, jax.Array]:
    r = p["a"][0] + p["b"] * t + p["a"][1] * t**2 - y
    return {"early": r[:5], "late": r[5:].reshape(1, -1)}


def textbook(columns: np.ndarray, r: np.ndarray) -> np.ndarray:
    m, n = columns.shape
    return np.linalg.inv(columns.T @ columns) * (r @ r) / (m - n)


@pytest.mark.usefixtures("x64")
def test_residuals_in_a_tree_and_parameters_in_ravelled_order() -> None:
    t, y = data()
    r = np.concatenate([np.ravel(x) for x in bent(ORDER, t, y).values()])
    expected = textbook(np.stack([t**0, t**2, t], axis=1), r)
    for args in ((t, y), [t, y], {"y": y, "t": t}):
        found = gx.covariance(bent, ORDER, args=args)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(found, found.T, rtol=1e-14)


def test_units_of_parameters_and_of_data_do_not_matter() -> None:
    t, y = (jnp.asarray(x, jnp.float32) for x in data())
    basis, units = jnp.stack([t**0, t, t**3]), jnp.asarray([1e-14, 1.0, 1e14])
    line = lambda p, unit, units: unit * ((p / units) @ basis - y)
    plain = gx.covariance(line, jnp.ones(3), args=(1.0, 1.0))
    for unit in (1e-15, 1.0, 1e15):
        found = gx.covariance(line, units, args=(unit, units))
        scaled = np.asarray(found, float) / np.outer(units, units)
        np.testing.assert_allclose(scaled, plain, rtol=1e-4, atol=1e-6)


def test_float32_keeps_the_digits_of_an_ill_conditioned_fit() -> None:
    """A condition number of 4e3; its square would leave no digit."""
    t, _ = data()
    powers, r = (t[:, None] + 4) ** np.arange(4), 0.1 * np.sin(50 * t)
    residuals = lambda p, j, r: j @ (p - 1) + r
    found = gx.covariance(residuals, jnp.ones(4), args=(jnp.asarray(powers), jnp.asarray(r)))
    errors, expected = (np.sqrt(np.diag(x)) for x in (found, textbook(powers, r)))
    np.testing.assert_allclose(errors, expected, rtol=0.02)


# -- negative log likelihoods


def cross_entropy(logits: Any, y: Any) -> jax.Array:
    return jnp.sum(jax.nn.softplus(logits) - y * logits)


@pytest.mark.usefixtures("x64")
def test_a_negative_log_likelihood_gives_the_inverse_information() -> None:
    t, _ = data()
    x, y = np.stack([t**0, np.cos(7 * t)], axis=1), (np.sin(31 * t) > 0).astype(float)
    weights = jnp.asarray([0.3, -0.4])
    p = 1 / (1 + np.exp(-x @ weights))
    expected = np.linalg.inv(x.T * (p * (1 - p)) @ x)
    composed = gx.compose(cross_entropy, lambda w, x: x @ w, x=x)
    for found in (
        gx.covariance(lambda w: cross_entropy(x @ w, y), weights),
        gx.covariance(composed, weights, args={"y": y}),
        gx.covariance(composed, weights, args={"y": y}, curvature=gx.gauss_newton()),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_the_two_forms_agree_on_a_line() -> None:
    t, y = data()
    squares = lambda p: tree.vdot(*[bent(p, t, y)] * 2)
    likelihood = lambda p, s2: 0.5 * squares(p) / s2
    found = gx.covariance(likelihood, ORDER, args=(float(squares(ORDER)) / (len(t) - 3),))
    np.testing.assert_allclose(found, gx.covariance(bent, ORDER, args=(t, y)), rtol=1e-8)


# -- what the data do not determine


def steps() -> jax.Array:
    return jnp.arange(12.0)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p: p[0] ** 2 - p[1] ** 2,
        lambda p: (p[0] + p[1]) ** 2,
        lambda p: p[0] ** 2,
        lambda p: (p[0] + 0.3 * p[1]) ** 2 + 1e-7 * p[1] ** 2,
        lambda p: jnp.sqrt(p[0] - p[1] - 5) + p[1] ** 2,
        lambda p: (p[0] + 0.3 * p[1]) * steps() - 1,
        lambda p: (p[0] + 1) * steps(),
        lambda p: p[0] * steps() + p[1] * (0.7 * steps() + 1e-7),
        lambda p: p[0] / steps() + p[1],
    ],
    ids=list("abcdefghi"),
)
def test_everything_is_nan_if_a_direction_is_not_determined(fn: Any) -> None:
    with jax.debug_nans(False), jax.debug_infs(False):
        assert jnp.isnan(gx.covariance(fn, jnp.asarray([0.7, 0.9]))).all()


# -- transformations


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["residuals", "likelihood"])
def test_derivatives_are_those_of_finite_differences(form: str) -> None:
    t, y = data()

    def number(x: jax.Array) -> jax.Array:
        r = lambda p: x[0] * exp(-p[0] * t) + x[1] * p[1] * t - y + x[2] * p[1] ** 2 * t**3
        fn = r if form == "residuals" else lambda p: jnp.sum(jnp.cosh(r(p))) + 9 * p @ p
        return jnp.sum(
            gx.covariance(fn, jnp.asarray([0.4, 0.6])) * jnp.asarray([[1.0, 2.0], [2.0, 7.0]])
        )

    x, along = jnp.asarray([1.2, 0.8, 0.3]), jnp.asarray([0.3, 0.9, -0.5])
    expected = finite_difference(jax.jit(number), x, 1e-4)
    assert jax.jit(jax.grad(number))(x) @ along == pytest.approx(expected, rel=1e-7)
    assert jax.jit(jax.jvp, static_argnums=0)(number, (x,), (along,))[1] == pytest.approx(
        expected, rel=1e-7
    )


def test_a_batch_of_data_sets_and_new_data_without_compiling() -> None:
    traces = []

    def residuals(p: jax.Array, y: Any) -> jax.Array:
        traces.append(None)
        return p[0] + p[1] * t - y

    t, y = (jnp.asarray(x, jnp.float32) for x in data())
    p = jnp.asarray([1.5, 0.5])
    sets = jnp.stack([factor * y for factor in (1.0, 1.1, 0.9)])
    alone, counts = [], []
    for one in sets:
        alone.append(gx.covariance(residuals, p, args=(one,)))
        counts.append(len(traces))
    assert counts[1] == counts[2]  # the first call changes the counter that the function reads
    batch = jax.jit(jax.vmap(lambda y: gx.covariance(residuals, p, args=(y,))))(sets)
    np.testing.assert_allclose(batch, jnp.stack(alone), rtol=1e-4)


def test_more_columns_than_are_computed_at_once() -> None:
    n, m = 70, 80
    j = np.eye(m, n, dtype=np.float32) * np.arange(1, n + 1, dtype=np.float32)
    found = gx.covariance(lambda p, j: j @ p - 1, jnp.zeros(n), args=(j,))
    np.testing.assert_allclose(jnp.diag(found), 8 / np.arange(1, n + 1) ** 2, rtol=1e-5)
    found = gx.covariance(lambda p, j: 0.5 * jnp.sum((j @ p) ** 2), jnp.zeros(n), args=(j,))
    np.testing.assert_allclose(jnp.diag(found), 1 / np.arange(1, n + 1) ** 2, rtol=1e-5)


def test_half_precision_no_parameters_and_a_perfect_fit() -> None:
    half = {"a": jnp.asarray(1.5, jnp.bfloat16), "b": jnp.asarray([0.5], jnp.bfloat16)}
    t, y = (jnp.asarray(x, jnp.float32) for x in data())
    found = gx.covariance(lambda p: p["a"] + p["b"] * t - y, half)
    assert (found.dtype, found.shape) == (jnp.float32, (2, 2))
    assert gx.covariance(lambda p: 1.0, ()).shape == (0, 0)
    assert (gx.covariance(lambda p: p * t, 0.0) == 0).all()


# -- what is refused


def test_what_is_no_likelihood_and_no_residuals_is_refused_in_one_line() -> None:
    p = jnp.ones(2)
    for fn, message in (
        (lambda p: (jnp.sum(p), p), r"fn returns a pair .* has_aux"),
        (lambda p: jnp.ones(3, int), r"or residuals, got \['int32\[3\]'\]"),
        (lambda p: jnp.asarray(1j), r"fn must return one real number, got complex"),
        (lambda p: None, "must return one real number or residuals"),
        (lambda p: p, "2 residuals for 2 parameters"),
    ):
        with pytest.raises(ValueError, match=rf"^covariance: .*{message}") as caught:
            gx.covariance(fn, p)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^covariance\(curvature=.*leave curvature out"):
        gx.covariance(lambda p: p[0] * jnp.ones(5), p, curvature=gx.hessian())
    with pytest.raises(TypeError, match=r"^covariance\(args=\(.*\)\): fn\(p\) does not take"):
        gx.covariance(lambda p: p, p, args=(1.0,))
    with pytest.raises(TypeError, match=r"^covariance\(args=.*takes its data by name"):
        gx.covariance(gx.compose(jnp.sum, lambda p, x: p * x), p, args=(1.0,))
    with pytest.raises(TypeError, match=r"^covariance: params\['n'\] has dtype int"):
        gx.covariance(lambda p: p["n"], {"n": 3})
    with pytest.raises(ValueError, match=r"gauss_newton needs .*gx\.compose"):
        gx.covariance(lambda p: jnp.sum(p**2), p, curvature=gx.gauss_newton())


def test_arrays_in_a_callable_pytree_are_inputs_of_the_program() -> None:
    traces = []

    def residuals(y: jax.Array, p: jax.Array) -> jax.Array:
        traces.append(None)
        return p[0] + p[1] * steps() - y

    counts = []
    for k in range(3):
        y = jnp.cos(steps()) + k
        fn = jax.tree_util.Partial(residuals, y)
        found = gx.covariance(fn, jnp.ones(2))
        counts.append(len(traces))
        np.testing.assert_allclose(
            found, gx.covariance(lambda p, y=y: residuals(y, p), jnp.ones(2)), rtol=1e-4
        )
        traces.clear()
    assert counts[0] > 0
    assert counts[2] == 0


@pytest.mark.usefixtures("x64")
def test_complex_parameters_and_residuals_count_as_two_real_ones() -> None:
    t, y = data()
    turned = lambda z, t, y: z * jnp.exp(1j * t) + jnp.conj(z) * t - y * (1 + 0.5j)
    found = gx.covariance(turned, jnp.asarray(0.7 - 0.2j), args=(t, y))

    def parts(p: jax.Array) -> list[jax.Array]:
        r = turned(p[0] + 1j * p[1], t, y)
        return [r.real, r.imag]

    np.testing.assert_allclose(found, gx.covariance(parts, jnp.asarray([0.7, -0.2])), rtol=1e-9)
    misfit = lambda p: jnp.sum(jnp.abs(turned(p["z"], t, y)) ** 2)
    best = {"z": 0.7 - 0.2j}
    scatter = 2 * misfit(best) / (2 * t.size - 2)
    np.testing.assert_allclose(found, scatter * gx.covariance(misfit, best), rtol=1e-9)
