import math
import re
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import gradxform as gx

rng = np.random.default_rng(3)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) / math.sqrt(shape[0]))


X, LABELS = rng.normal(size=(6, 4)), np.array([0, 2, 1, 1, 0, 2])


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["in_out"] + p["b"]) @ p["out_in"].T  # weights stored in both ways


def shared(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["w"].T @ p["v"]


def attention(p: Any, x: jax.Array) -> jax.Array:
    tokens = x[:, :, None] * p["embed"]
    q, k, v = (tokens @ w for w in p["qkv"])
    weights = jax.nn.softmax(jnp.einsum("bic,bjc->bij", q, k))
    return jnp.mean(weights @ v, axis=1) @ p["head"]


def scanned(p: Any, x: jax.Array) -> jax.Array:
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])
    return h @ p["head"]


def models() -> dict[str, tuple[Any, Any]]:
    return {
        "mlp": (mlp, {"in_out": normal(4, 5), "b": normal(5), "out_in": normal(3, 5)}),
        "shared": (shared, {"w": normal(4, 4), "v": normal(4, 3)}),
        "attention": (
            attention,
            {"embed": normal(4, 2), "qkv": normal(3, 2, 2), "head": normal(2, 3)},
        ),
        "scanned": (scanned, {"layers": normal(3, 4, 4), "head": normal(4, 3)}),
    }


def dense(product: Any, params: Any) -> jax.Array:
    vector, unravel = ravel_pytree(params)
    row = lambda v: ravel_pytree(product(unravel(v)))[0]
    return jax.jit(jax.vmap(row))(jnp.eye(vector.size))


def reference(name: str, model: Any, params: Any) -> jax.Array:
    """The matrix from JAX's own dense derivatives."""
    vector, unravel = ravel_pytree(params)
    loss = lambda outputs: cross_entropy(outputs, jnp.asarray(LABELS))
    of_vector = lambda v: model(unravel(v), jnp.asarray(X))
    if name == "hessian":
        return jax.hessian(lambda v: loss(of_vector(v)))(vector)
    outputs = of_vector(vector)
    jacobian = jax.jacobian(of_vector)(vector).reshape(outputs.size, -1)
    bend = jax.hessian(loss)(outputs).reshape(outputs.size, outputs.size)
    return jacobian.T @ bend @ jacobian


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("of", ["mlp", "shared", "attention", "scanned"])
def test_products_are_exact(name: str, of: str) -> None:
    model, params = models()[of]
    data = {"x": jnp.asarray(X), "y": jnp.asarray(LABELS)}
    value_fns = [gx.compose(cross_entropy, model, **data)]
    if of in ("mlp", "attention"):
        value_fns += [gx.compose(cross_entropy, model, chunks=3, **data)]
        value_fns += [gx.compose(cross_entropy, model, chunks=2, recompute=False, **data)]

    @jax.jit
    def of_all(params: Any) -> Any:
        found = []
        for value_fn in value_fns:
            product = getattr(gx, name)()(value_fn, params)
            value, grad = jax.value_and_grad(value_fn)(params)
            found.append((dense(product, params), value, ravel_pytree(grad)[0]))
        return reference(name, model, params), found

    expected, found = of_all(params)
    for matrix, value, grad in found:
        np.testing.assert_allclose(matrix, expected, atol=1e-12)
        np.testing.assert_allclose(value, found[0][1], rtol=1e-13)
        np.testing.assert_allclose(grad, found[0][2], atol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid", "normal"])
def test_gauss_newton_is_the_fisher_of_the_usual_losses(likelihood: str) -> None:
    """Against the expected outer product of the gradients of log p over all labels, explicitly."""
    model, params = models()["mlp"]
    vector, unravel = ravel_pytree(params)
    x = jnp.asarray(X)

    def log_p(v: jax.Array, x: jax.Array, label: Any) -> jax.Array:
        z = model(unravel(v), x[None])[0]
        if likelihood == "softmax":
            return jax.nn.log_softmax(z)[label]
        if likelihood == "sigmoid":
            return jnp.sum(jnp.where(label, jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)))
        return -0.5 * jnp.sum((z - label) ** 2)

    def labels_of(z: np.ndarray) -> list[tuple[float, Any]]:
        """Every label with its probability; for the normal, points of its mean and covariance."""
        if likelihood == "softmax":
            return list(zip(np.asarray(jax.nn.softmax(z)), range(3), strict=True))
        signs = [np.array(s) for s in np.ndindex(2, 2, 2)]
        if likelihood == "sigmoid":
            p = np.asarray(jax.nn.sigmoid(z))
            return [(float(np.prod(np.where(s, p, 1 - p))), s == 1) for s in signs]
        return [(1 / 8, z + 2 * s - 1) for s in signs]

    fisher = np.zeros((vector.size, vector.size))
    gradient, outputs = jax.jit(jax.grad(log_p)), np.asarray(model(params, x))
    for example, z in zip(x, outputs, strict=True):
        for probability, label in labels_of(z):
            g = gradient(vector, example, label)
            fisher += probability * np.outer(g, g) / len(x)

    y = {"softmax": jnp.asarray(LABELS), "sigmoid": jnp.ones((6, 3)), "normal": jnp.zeros((6, 3))}
    losses = {
        "softmax": cross_entropy,
        "sigmoid": lambda z, y: -jnp.mean(jnp.sum(y * z - jax.nn.softplus(z), 1)),
        "normal": lambda z, y: 0.5 * jnp.mean(jnp.sum((z - y) ** 2, 1)),
    }
    value_fn = gx.compose(losses[likelihood], model, x=x, y=y[likelihood])
    product = gx.gauss_newton()(value_fn, params)
    np.testing.assert_allclose(dense(product, params), fisher, atol=1e-12)


# -- what a product costs


NAME = r"%?([\w.\-]+)"


def dot_flops(hlo: str, *, in_loop: bool = False) -> float:
    """The operations of all dots of a compiled program, or of its loop of unknown length.

    A loop of known length counts that often, a conditional as its largest branch.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if match := re.match(rf"(ENTRY )?{NAME} .*\{{$", line):
            lines = computations["ENTRY" if match[1] else match[2]] = []
        lines.append(line)

    def shape_in(lines: list[str], name: str) -> list[int]:
        pattern = re.compile(rf"\s*(?:ROOT )?%?{re.escape(name)} = \w+\[([\d,]*)\]")
        (found,) = filter(None, map(pattern.match, lines))
        return [int(d) for d in found[1].split(",") if d]

    def of_line(line: str, lines: list[str]) -> float:
        if match := re.match(rf"\s*(?:ROOT )?{NAME} = .* dot\({NAME}", line):
            axes = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", line)
            left = shape_in(lines, match[2])
            contracted = [left[int(a)] for a in axes[1].split(",")] if axes else []
            return 2 * math.prod(shape_in(lines, match[1])) * math.prod(contracted)
        if match := re.search(rf" while\(.*body={NAME}", line):
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            return (int(trips[1]) if trips else 1) * flops(match[1])
        if match := re.search(r"branch_computations=\{([^}]*)\}", line):
            return max(flops(name.strip(" %")) for name in match[1].split(","))
        return sum(flops(name) for name in re.findall(rf"(?:calls|to_apply)={NAME}", line))

    def flops(name: str) -> float:
        lines = computations[name]
        return sum(of_line(line, lines) for line in lines)

    if not in_loop:
        return flops("ENTRY")
    bodies = re.findall(rf" while\((?!.*known_trip_count).*body={NAME}", hlo)
    return max(flops(body) for body in bodies)


def wide(p: Any, x: jax.Array) -> jax.Array:
    for w in p[:-1]:
        x = jnp.tanh(x @ w)
    return x @ p[-1]


@pytest.mark.parametrize("kind", ["plain", "chunks", "layers"])
@pytest.mark.parametrize(("name", "most"), [("gauss_newton", 1.15), ("hessian", 1.4)])
def test_a_product_costs_little_more_than_a_gradient(name: str, most: float, kind: str) -> None:
    """Counted in the compiled body of CG's loop: what is linearised once must not be in it."""
    shape = jax.ShapeDtypeStruct
    params: Any = [shape(s, jnp.float32) for s in ((784, 500), (500, 300), (300, 10))]
    model = wide
    if kind == "layers":
        params = {"first": shape((784, 100), jnp.float32), "head": shape((100, 10), jnp.float32)}
        params["layers"] = shape((3, 100, 100), jnp.float32)
        model = lambda p, x: scanned(p, x @ p["first"])

    def value_fn(x: jax.Array, y: jax.Array) -> Any:
        chunks = 4 if kind == "chunks" else 1
        return gx.compose(cross_entropy, model, chunks=chunks, recompute=False, x=x, y=y)

    tx = gx.scale_by_newton_cg(curvature=getattr(gx, name)())

    def update(params: Any, x: jax.Array, y: jax.Array) -> Any:
        return tx.update(params, tx.init(params), params, value_fn=value_fn(x, y))

    arguments = (params, shape((32, 784), jnp.float32), shape((32,), jnp.int32))
    compiled = jax.jit(update).lower(*arguments).compile().as_text()
    gradient = jax.jit(lambda p, x, y: jax.grad(value_fn(x, y))(p)).lower(*arguments).compile()
    ratio = dot_flops(compiled, in_loop=True) / dot_flops(gradient.as_text())
    assert 0.9 < ratio < most


@pytest.mark.parametrize("name", ["gradient", "hessian", "gauss_newton"])
def test_chunks_bound_memory(name: str) -> None:
    shape = jax.ShapeDtypeStruct
    params = [shape(s, jnp.float32) for s in ((8, 64), (64, 64), (64, 3))]

    def temporary_bytes(chunks: int) -> int:
        def compute(params: Any, v: Any, x: jax.Array, y: jax.Array) -> Any:
            value_fn = gx.compose(cross_entropy, wide, chunks=chunks, x=x, y=y)
            if name == "gradient":
                return jax.grad(value_fn)(params)
            return getattr(gx, name)()(value_fn, params)(v)

        data = (shape((8192, 8), jnp.float32), shape((8192,), jnp.int32))
        compiled = jax.jit(compute).lower(params, params, *data).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16) < temporary_bytes(1) / 8


# -- what the curvatures are called with


def test_gauss_newton_of_a_plain_function_says_how_to_compose() -> None:
    with pytest.raises(ValueError, match=r"gauss_newton needs.*gx\.compose\(loss, model\)"):
        gx.gauss_newton()(lambda x: jnp.sum(x**2), jnp.ones(2))
    tx = gx.newton_cg(curvature=gx.gauss_newton())
    with pytest.raises(ValueError, match=r"gx\.compose\(loss, model\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), value_fn=jnp.sum)


def squares(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((outputs - y) ** 2)


def line(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


LINE = {"w": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(0.5)}
DATA = {"x": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32), "y": jnp.arange(8.0)}
CURVATURES = pytest.mark.parametrize("curvature", [gx.hessian(), gx.gauss_newton()])


@CURVATURES
@pytest.mark.parametrize("chunks", [1, 4])
def test_data_reach_a_composed_function_through_update(curvature: Any, chunks: int) -> None:
    tx = gx.newton(curvature=curvature)
    value_fn = gx.compose(squares, line, chunks=chunks)
    gradient = jax.jit(jax.grad(lambda p: value_fn(p, **DATA)))
    update = jax.jit(lambda g: tx.update(g, tx.init(LINE), LINE, value_fn=value_fn, **DATA)[0])
    after = jax.tree.map(jnp.add, LINE, update(gradient(LINE)))
    slope = gradient(after)
    assert max(jnp.abs(g).max() for g in jax.tree.leaves(slope)) < 1e-4


def test_masked_keeps_the_parts_of_a_composed_function() -> None:
    value_fn = gx.compose(squares, line, **DATA)
    tx = gx.masked(gx.newton(curvature=gx.gauss_newton()), {"w": True, "b": False})
    grads = jax.grad(value_fn)(LINE)
    updates, _ = tx.update(grads, tx.init(LINE), LINE, value_fn=value_fn)
    after = {"w": LINE["w"] + updates["w"], "b": LINE["b"]}
    assert jnp.abs(jax.grad(value_fn)(after)["w"]).max() < 1e-4


@CURVATURES
def test_half_precision_parameters_have_float32_products(curvature: Any) -> None:
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), LINE)
    value_fn = gx.compose(squares, line, **DATA)
    product = curvature(value_fn, half)(LINE)
    expected = curvature(value_fn, LINE)(LINE)
    for a, b in zip(jax.tree.leaves(product), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("library", ["nnx", "linen", "equinox"])
def test_module_libraries(library: str) -> None:
    """A linear module and squared error, whose Gauss–Newton matrix is the Hessian."""
    x, y = DATA["x"], DATA["y"][:, None]
    params: Any
    if library == "nnx":
        module = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        params = nnx.as_pure(nnx.state(module, nnx.Param))
        model = gx.nnx_value_fn(module, lambda module, x: module(x))
    elif library == "linen":
        model = nn.Dense(1).apply
        params = nn.Dense(1).init(jax.random.key(0), x)
    else:
        module = eqx.nn.Linear(2, 1, key=jax.random.key(0))
        params, static = eqx.partition(module, eqx.is_array)
        model = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    value_fn = gx.compose(lambda z: jnp.mean((z - y) ** 2), lambda p: model(p, x))
    matrices = [
        dense(curvature()(value_fn, params), params) for curvature in (gx.hessian, gx.gauss_newton)
    ]
    assert jnp.abs(matrices[0]).max() > 0.1
    np.testing.assert_allclose(matrices[1], matrices[0], atol=1e-5)
    tx = gx.newton(curvature=gx.gauss_newton())
    updates, _ = tx.update(jax.grad(value_fn)(params), tx.init(params), params, value_fn=value_fn)
    after = jax.tree.map(jnp.add, params, updates)
    assert max(jnp.abs(g).max() for g in jax.tree.leaves(jax.grad(value_fn)(after))) < 1e-4
