"""The compiled programs of a sweep: members that differ only in traced numbers share one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gradxform import tree
from gradxform.evaluation import eval_params
from gradxform.lab.experiment import catalogue, methods
from gradxform.lab.experiment.grid import Member, Table, substitute
from gradxform.lab.tasks.task import Examples, Task
from gradxform.lab.training.epoch import TrainState, evaluate, init_state, make_epoch
from gradxform.lab.training.processes import put
from gradxform.lab.training.settings import Settings
from gradxform.tree import PyTree

Vary = Literal["initialisation", "order", "both"]


class Group(NamedTuple):
    """Members that share a program, because they differ only in traced numbers."""

    label: str
    table: Table  # table of the optimiser, with the numbers that are not traced
    paths: tuple[str, ...]  # paths of the traced numbers
    whole: frozenset[str]  # paths whose numbers are integers in every member
    members: tuple[int, ...]

    def built(self, values: jax.Array) -> Any:
        """The optimiser with these numbers, which may be traced."""
        traced = {
            path: value.astype(jnp.int32) if path in self.whole else value
            for path, value in zip(self.paths, values, strict=True)
        }
        return methods.build(substitute(self.table, traced), f"optimizers.{self.label}")


def groups_of(tables: Mapping[str, Table], members: Sequence[Member]) -> Iterator[Group]:
    """Groups the members by optimiser and by the numbers that set shapes."""
    found: dict[Any, list[int]] = {}
    shapes_of = {label: catalogue.numbers(table) for label, table in tables.items()}
    for number, member in enumerate(members):
        shapes = shapes_of[member.label]
        static = tuple((path, v) for path, v in member.values.items() if shapes.get(path))
        traced = tuple(path for path in member.values if not shapes.get(path))
        found.setdefault((member.label, static, traced), []).append(number)
    for (label, static, traced), numbers in found.items():
        table = substitute(tables[label], dict(static))
        whole = (p for p in traced if all(type(members[n].values[p]) is int for n in numbers))
        yield Group(label, table, traced, frozenset(whole), tuple(numbers))


class Programs(NamedTuple):
    """The compiled functions of a group; they work on blocks of members."""

    start: Callable[[jax.Array, jax.Array], TrainState]  #: values, seeds -> state
    epoch: Any  #: values, alive, state, data -> alive, state, cost; jitted, state donated
    metrics: Callable[[TrainState, Mapping[str, Examples]], dict[str, dict[str, jax.Array]]]
    has_own_key: bool  #: whether each member has a random key of its own
    compiled: dict[int, Any]  #: ``epoch`` by the number of lanes in a block


class Firsts(NamedTuple):
    """Initial parameters and random keys of each seed."""

    params: PyTree
    keys: jax.Array  # raw data of the keys for batches and dropout


def first_states(task: Task, seeds: Sequence[int], mesh: Mesh) -> Firsts:
    """The starts of all seeds, made once because random numbers are slow to compile."""

    @jax.jit
    def first(seed: jax.Array) -> Firsts:
        init_key, key = jax.random.split(jax.random.key(seed))
        return Firsts(task.init(init_key), jax.random.key_data(key))

    found = [jax.device_get(first(jnp.asarray(seed, jnp.int32))) for seed in seeds]
    return jax.tree.map(lambda *xs: put(np.stack(xs), mesh), *found)


def programs_of(
    task: Task,
    group: Group,
    settings: Settings,
    mesh: Mesh,
    seeds: Sequence[int],
    firsts: Firsts,
    vary: Vary,
) -> Programs:
    """The programs of a group; only shapes and untraceable numbers are fixed in them."""
    has_own_key = vary != "initialisation"
    state_axes: Any = TrainState(*cast(Any, (0, 0, None, 0 if has_own_key else None)))

    def start(values: jax.Array, seed: jax.Array, firsts: Firsts) -> TrainState:
        own, first = (jnp.searchsorted(jnp.asarray(seeds), n) for n in (seed, 0))
        params = jax.tree.map(lambda x: x[first if vary == "order" else own], firsts.params)
        key = jax.random.wrap_key_data(firsts.keys[own if has_own_key else first])
        return init_state(group.built(values), params, key)

    def epoch(
        values: jax.Array, alive: jax.Array, state: TrainState, train: Examples
    ) -> tuple[jax.Array, TrainState, jax.Array]:
        tx = group.built(values)
        one = make_epoch(task, tx, batch_size=settings.batch_size, order=settings.order)
        new, result = one(state, train)
        alive = alive & result.finite
        kept = tree.select(alive, new[:2], state[:2])
        cost = jnp.where(alive, result.cost, jnp.nan)
        return alive, TrainState(kept[0], kept[1], new.epoch, new.key), cost

    def metrics(state: TrainState, parts: Mapping[str, Examples]) -> dict[str, Any]:
        params = eval_params(state.opt_state, state.params)
        return {name: evaluate(task, params, part) for name, part in parts.items()}

    def across(f: Callable[..., Any], in_axes: Any, out_axes: Any, **options: Any) -> Any:
        """``f`` for a block of members that the devices share."""

        def specs(axes: Any) -> Any:
            return jax.tree.map(_spec, axes, is_leaf=lambda axis: axis is None)

        members = jax.vmap(f, in_axes, out_axes)
        sharded = jax.shard_map(
            members,
            mesh=mesh,
            in_specs=specs(in_axes),
            out_specs=specs(out_axes),
            check_vma=False,
        )
        return jax.jit(sharded, **options)

    begin = across(start, (0, 0, None), state_axes)
    return Programs(
        lambda values, seeds: begin(values, seeds, firsts),
        across(epoch, (0, 0, state_axes, None), (0, state_axes, 0), donate_argnums=2),
        across(metrics, (state_axes, None), 0),
        has_own_key,
        {},
    )


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec("member")
