"""A net as two functions, made from one of our models or from what a user registered.

A user's function returns a Flax linen or NNX module, an Equinox module, or a pair of functions.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from gradxform.lab.experiment.registry import GIVEN, Entry, in_own_words, parameters_of
from gradxform.lab.tasks import losses
from gradxform.lab.tasks.models import ModelError
from gradxform.tree import PyTree

_WANTED = (
    "should return a Flax module, an Equinox module, or a pair of functions "
    "init(key) and apply(params, x)"
)


class Net(NamedTuple):
    """A model as functions of its parameters."""

    init: Callable[[jax.Array], PyTree]  #: key -> parameters
    apply: Callable[[PyTree, jax.Array, jax.Array | None], jax.Array]
    """(params, x, key) -> outputs of a batch; with a key, dropout is on"""
    kernels: Callable[[PyTree], list[jax.Array]]  #: the leaves that a penalty covers


def of_ours(module: nn.Module, shape: Sequence[int]) -> Net:
    """The net of one of :data:`gradxform.lab.tasks.models.MODELS`.

    Args:
      module: the module.
      shape: the shape of one input.
    """

    def init(key: jax.Array) -> PyTree:
        return module.init(key, jnp.zeros((1, *shape), jnp.float32), train=False)["params"]

    def apply(params: PyTree, x: jax.Array, key: jax.Array | None) -> Any:
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, x, train=key is not None, rngs=rngs)

    return Net(init, apply, losses.kernels)


def of_entry(entry: Entry, shape: Sequence[int], outputs: int, options: Mapping[str, Any]) -> Net:
    """The net of a registered model, see :func:`gradxform.lab.model`.

    Args:
      entry: the function.
      shape: the shape of one input.
      outputs: the number of outputs of one example.
      options: the function's own arguments.

    Raises:
      ModelError: the function or the net fails, which the error says in their words; or the
        outputs have another shape.
    """
    takes = parameters_of(entry.make)

    def make(key: jax.Array) -> Any:
        at_hand = {"shape": tuple(shape), "outputs": outputs, "key": key}
        if "rngs" in takes:
            at_hand["rngs"] = nnx.Rngs(key)
        given = {name: at_hand[name] for name in GIVEN["model"] if name in takes}
        return entry.make(**given, **options)

    try:
        init, apply = _functions(entry.name, make, shape)
        params = jax.eval_shape(init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        key = jax.eval_shape(jax.random.key, 0)
        found = [jax.eval_shape(apply, params, x, None), jax.eval_shape(apply, params, x, key)]
    except ModelError:
        raise
    except Exception as error:  # what a user's function raises is unknown
        raise ModelError(f"model {entry.name}: {in_own_words(error, entry.make)}") from error
    _check_params(entry.name, params)
    for result in found:
        shapes = [(2, outputs), *([(2,)] if outputs == 1 else [])]
        if getattr(result, "shape", None) not in shapes:
            shown = getattr(result, "shape", type(result).__name__)
            raise ModelError(
                f"model {entry.name}: for inputs of shape {x.shape} the outputs should have the "
                f"shape {shapes[0]}, found {shown}"
            )
    return Net(init, lambda *args: apply(*args).reshape(-1, outputs), losses.matrices)


def _functions(
    name: str, make: Callable[[jax.Array], Any], shape: Sequence[int]
) -> tuple[Callable[..., PyTree], Callable[..., Any]]:
    """``init(key)`` and ``apply(params, x, key)`` of whatever a user's function returns."""
    made = make(jax.random.key(0))
    equinox = sys.modules.get("equinox")  # loaded if the user has made a module of it
    if isinstance(made, nn.Module):
        return _of_linen(name, made, shape)
    if isinstance(made, nnx.Module):
        return _of_nnx(name, make, made)
    if equinox is not None and isinstance(made, equinox.Module):
        return _of_equinox(make, made, equinox)
    if isinstance(made, tuple | list) and len(made) == 2 and all(map(callable, made)):
        init, apply = made
        options = _optional(apply)
        return init, lambda params, x, key: apply(params, x, **options(key))
    raise ModelError(f"model {name}: {_WANTED}, found {type(made).__name__}")


def _of_linen(
    name: str, module: nn.Module, shape: Sequence[int]
) -> tuple[Callable[..., PyTree], Callable[..., Any]]:
    options = _optional(type(module).__call__)

    def init(key: jax.Array) -> PyTree:
        variables = dict(module.init(key, jnp.zeros((1, *shape), jnp.float32), **options(None)))
        params = variables.pop("params", {})
        if variables:
            raise ModelError(f"model {name}: {_only_parameters(', '.join(variables))}")
        return params

    def apply(params: PyTree, x: jax.Array, key: jax.Array | None) -> Any:
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, x, rngs=rngs, **options(key))

    return init, apply


def _of_nnx(
    name: str, make: Callable[[jax.Array], nnx.Module], made: nnx.Module
) -> tuple[Callable[..., PyTree], Callable[..., Any]]:
    strange = {
        type(variable).__name__
        for _, variable in nnx.iter_graph(made)
        if isinstance(variable, nnx.Variable) and not isinstance(variable, nnx.Param | nnx.RngState)
    }
    if strange:
        raise ModelError(f"model {name}: {_only_parameters(', '.join(sorted(strange)))}")
    made.eval()
    evaluating, _, rest = nnx.split(made, nnx.Param, ...)
    made.train()
    training, _, _ = nnx.split(made, nnx.Param, ...)
    rest = nnx.as_pure(rest)

    def init(key: jax.Array) -> PyTree:
        return nnx.as_pure(nnx.split(make(key), nnx.Param, ...)[1])

    def apply(params: PyTree, x: jax.Array, key: jax.Array | None) -> Any:
        if key is None:
            return nnx.merge(evaluating, params, rest)(x)
        leaves, structure = jax.tree.flatten(rest)
        leaves = [
            jax.random.fold_in(key, i) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for i, x in enumerate(leaves)
        ]
        return nnx.merge(training, params, jax.tree.unflatten(structure, leaves))(x)

    return init, apply


def _of_equinox(
    make: Callable[[jax.Array], Any], made: Any, equinox: Any
) -> tuple[Callable[..., PyTree], Callable[..., Any]]:
    takes_key = "key" in inspect.signature(type(made).__call__).parameters
    _, static = equinox.partition(made, equinox.is_inexact_array)

    def init(key: jax.Array) -> PyTree:
        return equinox.filter(make(key), equinox.is_inexact_array)

    def apply(params: PyTree, x: jax.Array, key: jax.Array | None) -> Any:
        net = equinox.nn.inference_mode(equinox.combine(params, static), key is None)
        if not takes_key or key is None:
            return jax.vmap(net)(x)
        return jax.vmap(lambda x, key: net(x, key=key))(x, jax.random.split(key, len(x)))

    return init, apply


def _optional(function: Callable[..., Any]) -> Callable[[jax.Array | None], dict[str, Any]]:
    """What a function gets besides parameters and inputs, if its arguments have these names."""
    takes = inspect.signature(function).parameters

    def options(key: jax.Array | None) -> dict[str, Any]:
        known = {"train": key is not None, "deterministic": key is None, "key": key}
        return {name: value for name, value in known.items() if name in takes}

    return options


def _check_params(name: str, params: PyTree) -> None:
    leaves = jax.tree.leaves(params)
    strange = [x for x in leaves if not jnp.issubdtype(getattr(x, "dtype", object), jnp.floating)]
    if not leaves:
        raise ModelError(f"model {name}: it has no parameters")
    if strange:
        found = getattr(strange[0], "dtype", type(strange[0]).__name__)
        raise ModelError(f"model {name}: parameters should be real numbers, found {found}")


def _only_parameters(found: str) -> str:
    return (
        f"it holds {found}, which no loss trains: the lab has models of parameters alone; use a "
        "layer norm in place of a batch norm"
    )
