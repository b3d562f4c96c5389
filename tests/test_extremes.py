"""Parameters without entries, of more entries than int32 counts, and in nodes without ``==``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.methods import METHODS, one_of_each
from tests.thinning import every, in_turns

BUILT = {name: method.build() for name, method in METHODS.items()} | {
    "lbfgs_ravelled": gx.lbfgs(),
    "nonlinear_cg_ravelled": gx.nonlinear_cg(),
    "bfgs_by_leaf": gx.bfgs(ravel=False),
    "nystrom": gx.newton_cg(preconditioner=gx.nystrom(2)),
    "hutchinson": gx.hessian_free(curvature=gx.hessian(), preconditioner=gx.hutchinson_diagonal(2)),
    "hessian_free_nystrom": gx.hessian_free(curvature=gx.hessian(), preconditioner=gx.nystrom(2)),
    "searched_newton_cg": gx.with_line_search(gx.scale_by_newton_cg()),
    "trust_region_exact": gx.trust_region("exact", max_size=100),
    "masked": gx.masked(gx.newton_cg(), True),
    "accumulate": gx.accumulate(gx.lbfgs(ravel=False), 2),
    "label_of_no_parameter": gx.partition({1: gx.sgd(0.1), 2: gx.lbfgs(ravel=False)}, 1),
    "two_such_labels": gx.partition({1: gx.sgd(0.1), 2: gx.nonlinear_cg(), 3: gx.bfgs()}, 1),
    "minimize's own": None,
}
RUN = [*one_of_each(), "minimize's own"]
NAMES = [*RUN, *(name for name in BUILT if name not in {*METHODS, *RUN})]  # these only traced


def bowl(params: Any) -> jax.Array:
    return sum((jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(params)), start=jnp.zeros(()))


def two_updates(tx: optax.GradientTransformation, params: Any) -> tuple[Any, Any]:
    tx, state = optax.with_extra_args_support(tx), tx.init(params)
    for _ in range(2):
        value, grads = jax.value_and_grad(bowl)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=bowl)
        params = optax.apply_updates(params, updates)
    return gx.eval_params(state, params), state


EMPTY = {"no entries": {"a": jnp.zeros((0, 3)), "b": jnp.zeros(0)}, "no leaves": {}}


@pytest.mark.parametrize(("name", "size"), in_turns(NAMES, EMPTY))
def test_without_entries_every_method_rests(name: str, size: str) -> None:
    tx, params = BUILT[name], EMPTY[size]
    if tx is not None:
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
        found, state = jax.eval_shape(lambda params: two_updates(tx, params), params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == shapes
        assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(tx.init, params))
    if params and name in RUN:
        solution = gx.minimize(bowl, params, tx)
        assert solution.status == gx.Status.converged
        assert (solution.steps, solution.grad_norm, solution.value) == (0, 0, 0)


def test_a_label_of_no_parameter_changes_nothing() -> None:
    params = {"w": jnp.asarray([3.0, -2.0])}
    alone, _ = two_updates(gx.sgd(0.1), params)
    for name in ("label_of_no_parameter", "two_such_labels"):
        found, _ = two_updates(BUILT[name], params)
        assert jnp.array_equal(found["w"], alone["w"])


MANY = 3_000_000_000
TOO_LARGE = {
    "newton": r"newton\(max_size=100\): there are 3000000000 parameters",
    "trust_region_exact": r"trust_region\(max_size=100\): there are 3000000000 parameters",
    "coordinate_descent": r"coordinate_descent\(block=.*more than int32",
    "coordinate_descent_random": r"coordinate_descent\(block=.*more than int32",
    "bfgs": r"bfgs: there are 3000000000 parameters.*gx\.lbfgs",
    "bfgs_by_leaf": r"bfgs: there are 3000000000 parameters.*gx\.lbfgs",
}


# JAX itself says so where it takes one of a few vectors of this size
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")
@pytest.mark.parametrize("name", sorted({*TOO_LARGE, *every(2, BUILT)}))
def test_more_parameters_than_int32_counts(name: str) -> None:
    """By tracing alone: no memory is taken."""
    tx, params = BUILT[name], jax.ShapeDtypeStruct((MANY,), jnp.float32)

    def run(params: Any) -> Any:
        moved = None if tx is None else two_updates(tx, params)[0]
        return gx.minimize(bowl, params, tx).params, moved

    if name in TOO_LARGE:
        with pytest.raises(ValueError, match=f"^{TOO_LARGE[name]}"):
            jax.eval_shape(run, params)
    else:
        assert jax.eval_shape(run, params)[0].shape == (MANY,)


class Node:
    """A pytree node without ``__eq__``, and metadata that may be anything."""

    def __init__(self, w: Any, about: Any = None) -> None:
        self.w, self.about = w, about


jax.tree_util.register_pytree_node(
    Node, lambda node: ((node.w,), node.about), lambda about, children: Node(children[0], about)
)


ABOUT = {"none": None, "object": object()}


@pytest.mark.parametrize(("name", "kind"), in_turns(NAMES, ABOUT))
def test_a_node_without_equality_is_a_node_like_any(name: str, kind: str) -> None:
    about = ABOUT[kind]
    params, tx = Node(jnp.asarray([2.0, -1.0]), about), BUILT[name]
    if tx is None:
        assert isinstance(gx.minimize(bowl, params, max_steps=3).params, Node)
        return
    found, state = jax.eval_shape(lambda params: two_updates(tx, params), params)
    assert (found.w.shape, found.about) == ((2,), about)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(tx.init, params))


def test_a_node_that_holds_an_array_as_metadata() -> None:
    params = Node(jnp.asarray([2.0, -1.0]), np.arange(3))
    for tx in (BUILT["nystrom"], gx.masked(gx.sgd(0.1), True, mask_compatible_extra_args=True)):
        found, _ = two_updates(tx, params)
        assert jnp.isfinite(found.w).all()
    for steps in (1, 2):  # the second finds no compiled loop to compare metadata with
        solution = gx.minimize(bowl, params, gx.sgd(0.1), max_steps=steps)
        assert solution.steps == steps
    resumed = gx.minimize(bowl, params, gx.sgd(0.1), max_steps=100, resume=solution)
    assert resumed.status == gx.Status.converged


def test_a_mask_finds_the_gradients_among_extra_arguments_by_their_leaves() -> None:
    params = {"on": Node(jnp.ones(2)), "off": Node(jnp.ones(3))}
    seen = []

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        seen.append(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = gx.masked(inner, {"on": True, "off": False})
    tx.update(params, tx.init(params), params, grad=params, other=params)
    assert len(jax.tree.leaves(seen[0]["grad"])) == 1
    assert len(jax.tree.leaves(seen[0]["other"])) == 2
