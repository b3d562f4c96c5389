"""Parameters and data divided among eight virtual devices: the same numbers, nothing whole."""

import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import gradxform as gx
from gradxform import tree
from gradxform.lab.experiment.grid import Axis, members
from gradxform.lab.tasks.task import make_task
from gradxform.lab.training import blocks, programs
from gradxform.lab.training.epoch import to_device
from gradxform.lab.training.settings import Settings
from testbed import sharded
from testbed.collectives import always, busiest_loop, collectives
from testbed.sharded import OBJECTIVE, fully_sharded, mesh_of, parameters
from tests.lab.training.test_race import dataset
from tests.methods import METHODS, one_of_each
from tests.thinning import LONG, every

SIZES = (8, 8, 3)  # the last bias, of three, is whole on every device
COUNT = 8 * 8 + 8 + 8 * 3 + 3
WIDE = (128, 128, 128)  # where inner products are small beside gradients


def build(name: str) -> Any:
    """The method of the table, leaf by leaf, and large enough."""
    options = METHODS[name].options
    changes: dict[str, Any] = {"columns": 128} if "columns" in options else {}
    if name == "newton_cg":  # steps along hardly any curvature blow rounding up
        changes["damping"] = 1.0
    if name == "bfgs":
        changes["ravel"] = False
    return METHODS[name].build(**changes)


def data(mesh: Mesh | None) -> Any:
    rng = np.random.default_rng(1)
    arrays = rng.normal(size=(16, SIZES[0])), rng.normal(size=(16, SIZES[-1]))
    return jax.device_put(arrays, mesh and NamedSharding(mesh, PartitionSpec("data")))


def params_on(mesh: Mesh | None, *, divided: bool = True) -> Any:
    def put(p: np.ndarray) -> jax.Array:
        spec = fully_sharded(mesh, p.shape).spec if mesh and divided else PartitionSpec()
        return jax.device_put(p, mesh and NamedSharding(mesh, spec))

    return jax.tree.map(put, parameters(SIZES))


def train(tx: Any, mesh: Mesh | None, *, divided: bool = True) -> Any:
    """Parameters and state after two steps."""

    @jax.jit
    def run(params: Any, x: jax.Array, y: jax.Array) -> Any:
        turn = sharded.step(tx)
        body = lambda carry, _: (turn(*carry, x, y), None)
        return jax.lax.scan(body, (params, tx.init(params)), length=2)[0]

    return run(params_on(mesh, divided=divided), *data(mesh))


def assert_divided(name: str, state: Any, shardings: Any) -> None:
    """Of each leaf of the parameters that is divided, every leaf of the state is, into eight.

    Whole are numbers, what belongs to the bias of three, and the eigenvalues of a dense method.
    """
    dense = METHODS[name].dense
    leaves = jax.tree_util.tree_leaves_with_path(parameters(SIZES))
    *divided, last = (jax.tree_util.keystr(path) for path, _ in leaves)
    pairs = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True)
    for (path, leaf), sharding in pairs:
        where = jax.tree_util.keystr(path)
        if leaf.ndim and where.endswith(tuple(divided)):
            assert 8 * np.prod(sharding.shard_shape(leaf.shape)) == leaf.size, where
        elif where.endswith(last):
            assert leaf.size <= 3 * COUNT, where
        else:
            assert leaf.size <= (COUNT if dense else 16), where


@functools.cache
def on_one_device(name: str) -> Any:
    with jax.enable_x64(True):
        return jax.device_get(train(build(name), None)[0])


@pytest.mark.parametrize("name", every(2, one_of_each(3)))
@pytest.mark.usefixtures("x64")
def test_explicit_mode_takes_the_steps_of_one_device(name: str) -> None:
    tx, mesh = build(name), mesh_of(8, AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, state = train(tx, mesh)
    chex.assert_trees_all_close(jax.device_get(params), on_one_device(name), rtol=1e-9, atol=1e-10)
    assert_divided(name, state, jax.tree.map(lambda x: x.sharding, state))
    for p in jax.tree.leaves(params):
        assert p.sharding.is_equivalent_to(fully_sharded(mesh, p.shape), p.ndim)


MODES = [(AxisType.Auto, True), (AxisType.Auto, False), (AxisType.Explicit, False)]


@pytest.mark.parametrize(
    ("name", "kind", "divided"),
    [("newton_cg", *mode) for mode in MODES]
    + [("kronecker", *mode) for mode in MODES]
    + [("adam", *mode) for mode in every(3, MODES)],
)
@pytest.mark.usefixtures("x64")
def test_so_do_the_other_modes(name: str, kind: AxisType, divided: bool) -> None:
    tx, mesh = build(name), mesh_of(8, kind)
    with jax.set_mesh(mesh):
        params, state = train(tx, mesh, divided=divided)
    chex.assert_trees_all_close(jax.device_get(params), on_one_device(name), rtol=1e-9, atol=1e-10)
    if divided:
        assert_divided(name, state, jax.tree.map(lambda x: x.sharding, state))


@pytest.mark.parametrize("name", one_of_each(4))
def test_init_under_jit_of_shapes_makes_a_state_that_is_divided(name: str) -> None:
    """In automatic mode, where zeros know nothing of the parameters' sharding."""
    tx, mesh = build(name), mesh_of(8)
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, "f4", sharding=fully_sharded(mesh, p.shape)),
        parameters(SIZES),
    )
    program = jax.jit(tx.init).lower(params).compile()
    state = jax.eval_shape(tx.init, params)
    assert_divided(name, state, program.output_shardings)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    made = program.memory_analysis().output_size_in_bytes
    table = 16 * len(jax.tree.leaves(state))  # where they are
    assert made <= whole / 8 + 4 * (6 * COUNT if METHODS[name].dense else 200) + table
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


@pytest.mark.parametrize("name", ["momentum", "lbfgs", "bfgs", "trust_region"])
def test_an_eager_init_makes_a_state_that_is_divided(name: str) -> None:
    state = build(name).init(params_on(mesh_of(8)))
    assert_divided(name, state, jax.tree.map(lambda x: x.sharding, state))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_one_vector_of_all_is_refused_where_it_would_be_whole(kind: AxisType) -> None:
    mesh = mesh_of(8, kind)
    with jax.set_mesh(mesh):
        params = params_on(mesh)
        for tx in (gx.bfgs(), gx.lbfgs(), gx.nonlinear_cg(), gx.scale_by_lbfgs()):
            with pytest.raises(ValueError, match=r"params\[0\]\[0\] is sharded.*ravel=False"):
                tx.init(params)
        whole = params_on(mesh, divided=False)
        assert gx.lbfgs().init(whole).accepted.params.shape == (
            COUNT,
        )  # and one vector where they are


# -- what is sent


@pytest.fixture
def optimised() -> Iterator[None]:
    """Compiled as users do, with collectives joined."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def gathered(found: Any) -> list[int]:
    return sorted(c.size for c in found if c.kind == "all-gather")


@pytest.mark.parametrize("name", ["nonlinear_cg", "lbfgs", "lbfgs_bounded", "bfgs"])
def test_searches_gather_what_the_gradient_does_and_no_more(name: str) -> None:
    mesh, tx = mesh_of(8), build(name)
    with jax.set_mesh(mesh):
        given = sharded.abstract(tx, mesh, SIZES, examples=16)
        step = collectives(sharded.compiled_step(tx, given).as_text())
        gradient = collectives(sharded.compiled_gradient(given).as_text())
    assert gathered(gradient)
    if name == "bfgs":  # vectors, for the rows of H to be multiplied by, and never H
        assert max(c.size for c in step) <= 4 * COUNT * 4
    else:
        assert gathered(step) == gathered(gradient)


@functools.cache
def sent_by_products_and_gradients() -> tuple[Any, Any]:
    mesh = mesh_of(8)
    with jax.set_mesh(mesh):
        given = sharded.abstract(gx.sgd(0.1), mesh, WIDE, examples=16)
        product = collectives(sharded.compiled_products(gx.hessian(), given).as_text())
        return product, collectives(sharded.compiled_gradient(given).as_text())


@pytest.mark.parametrize(
    ("name", "rounds"),
    [
        # JAX's CG takes pᵀAp and rᵀr, its operator looks at the sign of vᵀHv before
        ("newton_cg", 3),
        ("trust_region_steihaug", 1),
        ("hessian_free", 1),
    ],
)
@pytest.mark.usefixtures("optimised")
def test_an_iteration_of_cg_sends_the_product_and_a_few_numbers(name: str, rounds: int) -> None:
    mesh, tx = mesh_of(8), build(name)
    with jax.set_mesh(mesh):
        given = sharded.abstract(tx, mesh, WIDE, examples=16)
        found = collectives(sharded.compiled_step(tx, given).as_text())
    product, gradient = sent_by_products_and_gradients()
    iteration, own = busiest_loop(found), busiest_loop(product)
    assert gathered(iteration) == gathered(own) == gathered(gradient)
    beyond = sum(c.size for c in iteration) - sum(c.size for c in own)
    assert 0 < beyond < 300
    numbers = [c for c in always(iteration) if c.size <= 128]
    assert len(numbers) == rounds


@pytest.mark.usefixtures("optimised")
def test_a_kronecker_step_sends_one_message_each_for_factors_and_model() -> None:
    """With whole parameters and divided data, beyond the gradient and a few numbers.

    Each device keeps some rows of each factor. They meet only to be inverted.
    """
    mesh, tx = mesh_of(8), gx.kronecker()
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        given = sharded.abstract(tx, mesh, WIDE, examples=1024)
        described = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
        params, state = jax.tree.map(described, (given.params, given.state))
        factors = jax.tree.map(
            lambda x: x if x.ndim == 2 else described(x), given.state.estimate.factors
        )
        state = state._replace(estimate=state.estimate._replace(factors=factors))
        given = given._replace(params=params, state=state)
        program = sharded.compiled_step(tx, given)
        found = collectives(program.as_text())
        (gradient,) = collectives(sharded.compiled_gradient(given).as_text())
    after = program.output_shardings[1].estimate.factors
    for x, sharding in zip(*map(jax.tree.leaves, (factors, after)), strict=True):
        part = (16, 128) if x.ndim == 2 else x.shape
        assert x.sharding.shard_shape(x.shape) == sharding.shard_shape(x.shape) == part
    gathered = [c for c in found if c.kind == "all-gather"]
    assert [(c.conditional, c.loop, c.size) for c in gathered] == [(True, "", 4 * 128**2)] * 4
    sums = [c for c in found if c.kind == "all-reduce"]
    assert len(sums) + len(gathered) == len(found)
    sizes = sorted(c.size for c in always(found))
    assert len(sizes) == 2
    assert sizes[0] <= 16  # the model's
    assert sizes[1] <= gradient.size + 16
    (probe,) = [c.size for c in sums if c.conditional and c.size > 16]
    assert probe <= gradient.size + 16


def test_preconditioners_and_minimize_in_explicit_mode() -> None:
    mesh = mesh_of(8, AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, (x, y) = params_on(mesh), data(mesh)
        objective = lambda params: OBJECTIVE(params, x=x, y=y)
        value, grads = jax.jit(jax.value_and_grad(objective))(params)
        for preconditioner in (gx.hutchinson_diagonal(2), gx.nystrom(2)):
            tx = gx.scale_by_newton_cg(preconditioner=preconditioner, damping=1.0, maxiter=2)
            update = jax.jit(lambda g, p, tx=tx: tx.update(g, tx.init(p), p, value_fn=objective)[0])
            direction = update(grads, params)
            assert float(tree.vdot(direction, grads)) > 0
            for d, p in zip(*map(jax.tree.leaves, (direction, params)), strict=True):
                assert d.sharding.is_equivalent_to(p.sharding, p.ndim)
        solution = gx.minimize(objective, params, max_steps=5)
    assert solution.value < value
    kept = solution.loop.state.accepted.params[0][0]
    assert kept.sharding.is_equivalent_to(params[0][0].sharding, kept.ndim)


# -- lowering


PLATFORMS = ("cpu", "cuda", "tpu")


def test_minimize_lowers_for_every_platform() -> None:
    start = {"a": jnp.asarray([3.0, -2.0]), "b": jnp.asarray(1.0)}
    bowl = lambda p: jnp.sum((p["a"] - 1) ** 2) + (p["b"] + 1) ** 4
    solve = jax.jit(lambda p: gx.minimize(bowl, p, gx.bfgs(), tol=1e-3)[:4])
    exported = jax.export.export(solve, platforms=PLATFORMS)(start)
    assert exported.platforms == PLATFORMS
    chex.assert_trees_all_close(jax.jit(exported.call)(start), solve(start), rtol=1e-5)


def test_a_block_of_a_sweep_lowers_for_every_platform() -> None:
    table = {"method": "momentum", "learning_rate": 0.1}
    options = {"hidden": [3], "dropout": 0.0, "input_dropout": 0.0}
    task = make_task(dataset(), "mlp", model_options=options, validation_split=0.2)
    runs = members({"x": table}, {"learning_rate": Axis((0.1, 1.0))}, {})
    (group,) = programs.groups_of({"x": table}, runs)
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("member",))
    firsts = programs.first_states(task, [0], mesh)
    settings = Settings(1, 16, "reshuffle", float("inf"))
    program = programs.programs_of(task, group, settings, mesh, [0], firsts, "both")
    part = to_device(task.train)
    _, (block,) = blocks.first_blocks(program, group, runs, part, mesh, None)
    arguments = block.values, block.alive, block.state, part
    exported = jax.export.export(program.epoch, platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    cost = jax.jit(exported.call)(*arguments)[2]
    np.testing.assert_allclose(cost, program.epoch(*arguments)[2], rtol=1e-5)


# -- meshes of other forms


FORMS = {
    "one device": ((1,), "a", (AxisType.Explicit,)),
    "two axes": ((2, 4), "ab", (AxisType.Explicit, AxisType.Explicit)),
    "of both kinds": ((2, 4), "ba", (AxisType.Auto, AxisType.Explicit)),
}


@pytest.mark.parametrize(
    "name", every(2, ["newton", "newton_cg", "bfgs", "trust_region", "hessian_free"])
)
@pytest.mark.parametrize("form", FORMS if LONG else ["of both kinds"])
def test_no_mesh_need_be_set_and_its_axes_may_be_of_both_kinds(form: str, name: str) -> None:
    shape, axes, kinds = FORMS[form]
    devices = np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape)
    sharding = NamedSharding(Mesh(devices, tuple(axes), axis_types=kinds), PartitionSpec("a"))
    tx, alone = build(name), np.linspace(-1, 2, 16, dtype=np.float32)

    @jax.jit
    def follow(x: jax.Array) -> jax.Array:
        fn = lambda x: jnp.sum(jnp.cosh(x - 0.5) * jnp.arange(1.0, 17.0))
        state = tx.init(x)
        for _ in range(3):
            value, grad = jax.value_and_grad(fn)(x)
            updates, state = tx.update(grad, state, x, value=value, grad=grad, value_fn=fn)
            x = optax.apply_updates(x, updates)
        return x

    divided = follow(jax.device_put(alone, sharding))
    np.testing.assert_allclose(divided, follow(jnp.asarray(alone)), rtol=1e-4, atol=1e-5)
    assert divided.sharding.is_equivalent_to(sharding, 1)


def test_an_axis_of_one_device_divides_nothing() -> None:
    mesh = mesh_of(1, AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones(4, np.float32), NamedSharding(mesh, PartitionSpec("data")))
        assert gx.minimize(lambda x: jnp.sum((x - 3) ** 2), x, gx.lbfgs()).value < 1e-6


@pytest.mark.parametrize("tx", [gx.coordinate_descent("greedy"), gx.bfgs(ravel=False)])
def test_the_last_axis_may_be_divided(tx: Any) -> None:
    def follow(x: jax.Array) -> jax.Array:
        fn = lambda x: jnp.sum(jnp.cosh(x - 0.5) * jnp.arange(1.0, 65.0).reshape(8, 8))
        return gx.minimize(fn, x, tx, max_steps=5).params

    mesh, alone = mesh_of(8, AxisType.Explicit), np.linspace(-1, 2, 64, dtype=np.float32)
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    divided = follow(jax.device_put(alone.reshape(8, 8), sharding))
    np.testing.assert_allclose(divided, follow(alone.reshape(8, 8)), rtol=1e-4, atol=1e-5)
    assert divided.sharding.is_equivalent_to(sharding, 2)
