"""Complex parameters: as in Optax for the methods without curvature, as two real ones elsewhere."""

import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

import gradxform as gx
from gradxform import tree
from gradxform.complex_leaves import Parts
from tests.methods import METHODS
from tests.thinning import LONG

pytestmark = pytest.mark.skipif(
    os.environ.get("GRADXFORM_STRICT") == "dtype_promotion",
    reason="a real number times a complex one promotes",
)
DTYPES = ["complex64", "complex128"]


def descent(
    tx: optax.GradientTransformation, f: Callable[[Any], jax.Array], params: Any, steps: int
) -> tuple[Any, Any]:
    """The last parameters and state of a loop that conjugates the gradients, as with Optax."""
    tx = optax.with_extra_args_support(tx)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        value, grads = jax.value_and_grad(f)(params)
        grads = jax.tree.map(jnp.conj, grads)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=f)
        return (optax.apply_updates(params, updates), state), None

    solve = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0])
    return solve(params)


def size(z: jax.Array) -> jax.Array:
    return jnp.real(z * jnp.conj(z))


# -- methods that scale a complex gradient by real numbers

# with the rates of Optax's own tests, which have no plain SGD and no complex AdaDelta
ELEMENTWISE = {
    "sgd": gx.sgd(1e-3),
    "momentum": gx.momentum(1e-3, 0.9),
    "nesterov": gx.nesterov(5e-4, 0.9),
    "adagrad": gx.adagrad(1.0),
    "rmsprop": gx.rmsprop(5e-3),
    "rmsprop with momentum": gx.rmsprop(5e-3, momentum=0.9),
    "adadelta": gx.adadelta(gx.linear_decay(1.0, 0.0, 10_000), eps=1e-7),
    "adam": gx.adam(1e-1),
    "rprop": gx.rprop(1e-1),
    "delta_bar_delta": gx.delta_bar_delta(1e-3, 1e-5),
    "polyak_average": gx.polyak_average(gx.adam(1e-1), decay=0.9),
}
TARGETS = {"bowl": jnp.asarray([1 + 1j, -1 - 1j, 1 + 1j]), "valley": jnp.asarray([1 + 1j, 2j])}


def bowl_and_valley(params: Any) -> jax.Array:
    """A parabola and a complex Rosenbrock function. They share no parameter."""
    bowl, valley = params["bowl"], params["valley"]
    a, b = TARGETS["valley"][0], valley[1] - valley[0] ** 2
    return jnp.sum(size(bowl - TARGETS["bowl"])) + size(a - valley[0]) + 100 * size(b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_method_without_curvature_finds_complex_minima(name: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "complex128"):
        start = {"bowl": jnp.asarray([-1, 10, 1], dtype), "valley": jnp.zeros(2, dtype)}
        steps = 30_000 if name == "sgd" else 10_000
        params, state = descent(ELEMENTWISE[name], bowl_and_valley, start, steps)
        found = gx.eval_params(state, params)
        chex.assert_trees_all_close(found, TARGETS, rtol=3e-2, atol=3e-2)


def wave(params: Any) -> jax.Array:
    """Not quadratic, and not a function of ``|z|`` alone; with a real parameter too."""
    z, r = params["z"], params["r"]
    bent = z + 0.3 * jnp.conj(z) ** 2 - jnp.asarray([0.5 - 1j, 2j])
    return jnp.sum(jnp.asarray([1.0, 3.0]) * size(bent)) + (r - 1) ** 2 + 0.5 * jnp.real(z[0]) * r


def start(dtype: str = "complex128") -> dict[str, jax.Array]:
    z = jnp.asarray([0.3 - 0.2j, -0.4 + 0.5j], dtype)
    return {"z": z, "r": jnp.asarray(0.7, jnp.real(z).dtype)}


OPTAX = {
    "sgd": (gx.sgd(0.02), optax.sgd(0.02)),
    "momentum": (gx.momentum(0.02, 0.8), optax.sgd(0.02, 0.8)),
    "adam": (gx.adam(0.1, eps_root=1e-6), optax.adam(0.1, eps_root=1e-6)),
    "rmsprop": (gx.rmsprop(0.05), optax.rmsprop(0.05, 0.9, 1e-6, eps_in_sqrt=True)),
    "adagrad": (gx.adagrad(0.3, 0.0), optax.adagrad(0.3, 0.0, 0.0)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTAX)
def test_the_path_is_optaxs(name: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "complex128"):
        ours, theirs = (descent(tx, wave, start(dtype), 20)[0] for tx in OPTAX[name])
        close = 1e-12 if dtype == "complex128" else 1e-5
        chex.assert_trees_all_close(ours, theirs, rtol=close, atol=close)
        assert not np.allclose(ours["z"], start(dtype)["z"], atol=1e-2)


def test_adadelta_follows_its_formula_with_the_absolute_square() -> None:
    tx, rho, eps = gx.scale_by_adadelta(0.9, 0.01), 0.9, 0.01
    state, mean_g, mean_step = tx.init(jnp.zeros((), complex)), 0.0, 0.0
    for g in (3 + 4j, 1 - 2j, -1j):
        step, state = tx.update(jnp.asarray(g), state)
        assert isinstance(step, jax.Array)
        mean_g = rho * mean_g + (1 - rho) * abs(g) ** 2
        expected = np.sqrt(mean_step + eps) / np.sqrt(mean_g + eps) * g
        mean_step = rho * mean_step + (1 - rho) * abs(expected) ** 2
        np.testing.assert_allclose(step, expected, rtol=1e-5)


# -- every method


def split(params: Any) -> Any:
    """The same parameters as real ones, in the same order of entries."""
    return {"z": (jnp.real(params["z"]), jnp.imag(params["z"])), "r": params["r"]}


def split_wave(params: Any) -> jax.Array:
    return wave({"z": jax.lax.complex(*params["z"]), "r": params["r"]})


ALL: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    **{name: x.build for name, x in METHODS.items() if "bounds" not in x.options},
    "scale_by_lbfgs": lambda: optax.chain(gx.scale_by_lbfgs(), gx.sgd(0.1)),
    "newton with a search": lambda: gx.with_line_search(gx.scale_by_newton()),
    "newton_cg, diagonal": lambda: gx.newton_cg(preconditioner=gx.hutchinson_diagonal()),
    "newton_cg, nystrom": lambda: gx.newton_cg(0.5, 9.0, preconditioner=gx.nystrom(2)),
    "average of an accumulated search": lambda: gx.polyak_average(gx.accumulate(gx.bfgs(), 2)),
    "inject_hyperparams": lambda: gx.inject_hyperparams(gx.rprop)(0.02),
}
SCALED = ("adagrad", "rmsprop", "adam", "adadelta")  # by the size of the complex gradient
WHOLE = ("sgd", "momentum", "nesterov", "polyak", "average")  # have complex states


AS_TWO = [name for name in ALL if not name.startswith((*SCALED, "lbfgs_bounded"))]
THINNED = (  # other tests of this module have most of them
    *("sgd", "coordinate_descent_random", "bfgs", "newton", "newton_cg", "newton_cg, diagonal"),
    *("trust_region", "trust_region_steihaug", "hessian_free"),
)


@pytest.mark.parametrize("name", [name for name in AS_TWO if LONG or name not in THINNED])
@pytest.mark.usefixtures("x64")
def test_a_complex_leaf_is_two_real_ones(name: str) -> None:
    tx = ALL[name]()
    params, state = descent(tx, wave, start(), 8)
    real_params, real_state = descent(tx, split_wave, split(start()), 8)
    found = gx.eval_params(state, params)
    close = {"rtol": 1e-10, "atol": 1e-12}
    chex.assert_trees_all_close(split(params), real_params, **close)
    chex.assert_trees_all_close(split(found), gx.eval_params(real_state, real_params), **close)
    assert wave(found) < wave(start())
    assert found["z"].dtype == params["z"].dtype == complex
    if not name.startswith(WHOLE):
        pairs = zip(*map(jax.tree.leaves, (state, real_state)), strict=True)
        assert all(x.dtype == y.dtype and np.allclose(x, y, 1e-6, 1e-9) for x, y in pairs)
        assert type(state) is type(real_state)


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith(SCALED)])
def test_mean_squares_are_real(name: str) -> None:
    with jax.enable_x64(True):
        params = start("complex64")
        params, state = descent(METHODS[name].build(), wave, params, 3)
        assert params["z"].dtype == jnp.complex64
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if "'z'" in jax.tree_util.keystr(path):
                is_square = any(word in str(path) for word in ("square", "second_moment"))
                assert leaf.dtype == (jnp.float32 if is_square else jnp.complex64)


@pytest.mark.parametrize("name", ["adam", "rprop"])
def test_vmap_masks_and_devices(name: str) -> None:
    """Lanes and sharded entries equal the plain run, and a masked part equals its own problem."""
    tx = METHODS[name].build()
    f = lambda p: jnp.sum(size(p["z"] - (1 - 2j)) ** 2) + jnp.sum(jnp.abs(p["z"]) ** 2)
    z = jnp.exp(1j * jnp.arange(8.0))
    plain, _ = descent(tx, f, {"z": z}, 4)

    lanes = jax.vmap(lambda z: descent(tx, f, {"z": z}, 4)[0])(jnp.stack([2 * z, z]))
    np.testing.assert_allclose(lanes["z"][1], plain["z"], rtol=1e-4)

    mesh = jax.make_mesh((8,), ("data",))
    placed = jax.device_put(z, NamedSharding(mesh, PartitionSpec("data")))
    sharded, _ = descent(tx, f, {"z": placed}, 4)
    np.testing.assert_allclose(sharded["z"], plain["z"], rtol=1e-4)
    assert sharded["z"].sharding.spec == PartitionSpec("data")

    parts: Mapping[Hashable, Any] = {"on": tx, "off": optax.set_to_zero()}
    frozen = gx.partition(parts, {"z": "on", "w": "off"})
    both, _ = descent(frozen, lambda p: f(p) + size(p["w"]), {"z": z, "w": jnp.asarray(1j)}, 4)
    np.testing.assert_allclose(both["z"], plain["z"], rtol=1e-4)
    assert both["w"] == 1j


# -- objectives of gx.compose, and curvature


def signal(params: Any, t: jax.Array) -> jax.Array:
    """A damped oscillation around r."""
    return params["r"] + params["z"][0] * jnp.exp(params["z"][1] * t)


def misfit(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(size(outputs - y))


def fit(model: Callable[..., Any] = signal, **options: Any) -> Any:
    t = jnp.linspace(0.0, 1.0, 12)
    truth = {"z": jnp.asarray([1 - 2j, 2j - 0.5]), "r": jnp.asarray(0.5)}
    return gx.compose(misfit, model, t=t, y=signal(truth, t), **options)


def split_signal(params: Any, t: jax.Array) -> jax.Array:
    return signal({"z": jax.lax.complex(*params["z"]), "r": params["r"]}, t)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunks", [1, 3])
def test_curvature_of_a_complex_model(chunks: int) -> None:
    params, v = split(start()), split({"z": jnp.asarray([1 + 1j, -2j]), "r": jnp.asarray(0.5)})
    flat, unravel = ravel_pytree(params)
    real, whole = fit(split_signal, chunks=chunks), fit(chunks=chunks)
    join = lambda p: {"z": jax.lax.complex(*p["z"]), "r": p["r"]}

    def residuals(x: jax.Array) -> jax.Array:
        outputs = split_signal(unravel(x), real.data["t"])
        return jnp.stack([jnp.real(outputs), jnp.imag(outputs)]).reshape(-1)

    @jax.jit
    def products() -> Any:
        jacobian, direction = jax.jacfwd(residuals)(flat), ravel_pytree(v)[0]
        hessian = jax.hessian(lambda x: real(unravel(x)))(flat)
        matrices = 2 / 12 * jacobian.T @ jacobian, hessian
        expected = [unravel(matrix @ direction) for matrix in matrices]
        curvatures = gx.gauss_newton(), gx.hessian()
        of_real = [curvature(real, params)(v) for curvature in curvatures]
        of_complex = [split(curvature(whole, join(params))(join(v))) for curvature in curvatures]
        return expected, of_real, of_complex

    expected, of_real, of_complex = products()
    chex.assert_trees_all_close(of_real, expected, rtol=1e-10)
    chex.assert_trees_all_close(of_complex, expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_hessian_free_fits_a_complex_signal() -> None:
    tx = gx.hessian_free()
    params, _ = descent(tx, fit(), start(), 6)
    real_params, _ = descent(tx, fit(split_signal), split(start()), 6)
    chex.assert_trees_all_close(split(params), real_params, rtol=1e-8, atol=1e-10)
    assert fit()(params) < 0.1 * fit()(start())


# -- minimize

SOLVERS = {
    "default": None,
    "gauss_newton": gx.trust_region(curvature=gx.gauss_newton()),
    "optax": optax.adam(0.1),
    "a penalty": optax.chain(optax.add_decayed_weights(0.1), gx.sgd(0.05)),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.usefixtures("x64")
def test_minimize_takes_the_steps_of_the_real_problem(name: str) -> None:
    tx, f, split_f = SOLVERS[name], wave, split_wave
    if name == "gauss_newton":
        f, split_f = fit(), fit(split_signal)
    solution = gx.minimize(f, start(), tx, max_steps=40)
    real = gx.minimize(split_f, split(start()), tx, max_steps=40)
    assert {key: x.dtype for key, x in solution.params.items()} == {"z": complex, "r": float}
    chex.assert_trees_all_close(split(solution.params), real.params, rtol=1e-10, atol=1e-12)
    assert (solution.steps, solution.evaluations) == (real.steps, real.evaluations)
    assert solution.steps > 5
    # of the real and imaginary parts of the gradient
    largest = tree.max_abs(split(jax.grad(f)(solution.params)))
    np.testing.assert_allclose(solution.grad_norm, largest, rtol=1e-6, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_minimize_with_its_options() -> None:
    def fn(params: Any, target: jax.Array, scale: float) -> Any:
        bent = params["z"] + 0.3 * jnp.conj(params["z"]) ** 2 - target
        return scale * jnp.sum(size(bent)) + params["r"] ** 2, {"bent": bent}

    target, seen = jnp.asarray([0.5 - 1j, 2j]), []
    solve = lambda target, **options: gx.minimize(
        fn, start(), gx.momentum(0.05, 0.8), args=(target, 2.0), has_aux=True, **options
    )
    solution = solve(target, progress=seen.append, progress_every=3)
    assert solution.status == gx.Status.converged
    assert all(jnp.iscomplexobj(s.params["z"]) for s in seen)
    assert len(seen) > 1
    _, aux = fn(solution.params, target, 2.0)
    np.testing.assert_allclose(solution.aux["bent"], aux["bent"], rtol=1e-10)

    resumed = solve(target, resume=solve(target, max_steps=3))
    chex.assert_trees_all_close(resumed.params, solution.params)
    lanes = jax.jit(jax.vmap(solve))(jnp.stack([1j * target, target]))
    np.testing.assert_allclose(lanes.params["z"][1], solution.params["z"], rtol=1e-6)


def test_minimize_takes_a_python_number() -> None:
    solution = gx.minimize(lambda z: jnp.abs(z - 2j) ** 2, 1 + 1j, gx.sgd(0.5))
    np.testing.assert_allclose(solution.params, 2j, atol=1e-5)
    assert solution.params.dtype == jnp.complex64
    with pytest.raises(TypeError, match=r"^unsupported"):
        gx.minimize(lambda z: z + {}, 1j)
    with pytest.raises(TypeError, match=r"list of 2 numbers: pass jnp\.asarray"):
        gx.minimize(lambda z: size(z - 1), [1j, 1.0])


# -- errors


def test_an_objective_must_return_a_real_number() -> None:
    z = jnp.asarray([1 + 1j])
    message = r"must return one real number, got complex64 .*take its real part, or .*z\.real"
    with pytest.raises(ValueError, match=rf"^minimize: fn {message}"):
        gx.minimize(lambda z: jnp.sum(z**2), z)
    tx = gx.newton_cg()
    with pytest.raises(ValueError, match=rf"^value_fn {message}"):
        tx.update(z, tx.init(z), z, value_fn=lambda z: jnp.sum(z**2))
    tx = gx.lbfgs()
    with pytest.raises(ValueError, match=rf"^value {message}"):
        tx.update(z, tx.init(z), z, value=z[0])


# the states of the other methods do not say whether the parameters were complex
TOLD_APART = ["momentum", "adam", "rprop", "coordinate_descent", "lbfgs", "newton"]


@pytest.mark.parametrize("name", TOLD_APART)
def test_real_gradients_of_complex_parameters_are_refused(name: str) -> None:
    tx, whole, real = METHODS[name].build(), {"z": jnp.asarray([1 + 1j])}, {"z": jnp.ones(1)}
    f = lambda p: jnp.sum(size(p["z"]))
    for grads, params in ((real, whole), (whole, real)):
        with pytest.raises((TypeError, ValueError), match=r"gradients") as caught:
            tx.update(grads, tx.init(params), params, value=jnp.asarray(1.0), value_fn=f)
        assert "\n" not in str(caught.value)


def test_the_state_holds_parts_and_eval_params_joins_them() -> None:
    z = {"z": jnp.asarray([1 + 2j])}
    state: Any = gx.trust_region().init(z)
    assert isinstance(state.params["z"], Parts)
    chex.assert_trees_all_close(gx.eval_params(state, z), z)
