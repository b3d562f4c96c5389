"""Several processes, and all their devices, that do one run together by ``jax.distributed``."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradxform.lab.batching import Batches
from gradxform.tree import PyTree

Devices = Sequence[Any]  # of jax.Device, which is no type to pyright

WHOLE = PartitionSpec()


def join(where: str) -> bool:
    """Joins the other processes.

    Args:
      where: ``auto`` on a cluster that JAX knows, else ``HOST:PORT,PROCESS,PROCESSES``: where the
        first process listens, which of them this one is, from 0, and how many there are.

    Returns:
      Whether this is the first process, which writes what comes out.

    Raises:
      ValueError: ``where`` is none of these, or the others cannot be joined.
    """
    options: dict[str, Any] = {}
    match where.split(","):
        case ["auto"]:
            pass
        case [address, process, processes] if (
            ":" in address and process.isdecimal() and processes.isdecimal()
        ):
            options = {"num_processes": int(processes), "process_id": int(process)}
            options |= {"coordinator_address": address}
        case _:
            raise ValueError(
                "should be auto, or HOST:PORT,PROCESS,PROCESSES like localhost:1234,0,2"
            )
    # a request to end is answered here, between two epochs
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**options)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    own, every = jax.local_device_count(), jax.device_count()
    if own * jax.process_count() != every:
        raise ValueError(
            f"this process has {own} of {every} devices; give each of {jax.process_count()} as many"
        )
    return jax.process_index() == 0


def mesh_of(axis: str, devices: Devices) -> Mesh:
    """The devices in a row; the compiler finds what else is divided along it."""
    return Mesh(np.asarray(devices), (axis,))


def put(x: Any, mesh: Mesh, spec: PartitionSpec = WHOLE) -> jax.Array:
    """``x``, which every process has, on the devices of all, in buffers of its own."""
    if _is_key(x):
        data = put(jax.random.key_data(x), mesh, spec)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: np.array(x[at]))


def put_all(arrays: PyTree, mesh: Mesh, spec: PartitionSpec = WHOLE) -> PyTree:
    """:func:`put` of every leaf."""
    return jax.tree.map(lambda x: put(x, mesh, spec), arrays)


def put_rows(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """The rows of ``x`` divided among the devices: a process puts its own part on its own.

    The last row is repeated until the devices divide their number.
    """
    (axis,) = mesh.axis_names
    rows = np.minimum(np.arange(_multiple(len(x), mesh)), len(x) - 1)
    shape, sharding = (len(rows), *x.shape[1:]), NamedSharding(mesh, PartitionSpec(axis))

    def part(at: Any) -> np.ndarray:
        return x[rows[at[0]]]

    return jax.make_array_from_callback(shape, sharding, part)


def read(x: jax.Array) -> np.ndarray:
    """``x`` on the host, the parts of other processes included; of random keys their data."""
    if _is_key(x):
        x = jax.random.key_data(x)
    if jax.process_count() > 1 and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def of_first(number: float, mesh: Mesh) -> float:
    """The first process's ``number``, where each that has a part of the mesh has its own."""
    if len({device.process_index for device in mesh.devices.flat}) == 1:
        return number
    return float(multihost_utils.broadcast_one_to_all(np.float32(number)))


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    return bool(max(_of_each(flag)))


def least_of(number: float) -> float:
    """The least ``number`` of all processes."""
    return min(_of_each(number))


def _of_each(number: Any) -> list[Any]:
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return [number]
    return multihost_utils.process_allgather(np.asarray(number, np.float32)).tolist()


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


# -- inside a compiled program


def filled(batches: Batches, mesh: Mesh) -> Batches:
    """Batches of as many examples as the devices divide, those that fill them up without weight."""
    missing = _multiple(batches.indices.shape[1], mesh) - batches.indices.shape[1]
    return Batches(*(jnp.pad(x, ((0, 0), (0, missing))) for x in batches))


def divided(arrays: PyTree, mesh: Mesh) -> PyTree:
    """The rows of all arrays divided among the devices."""
    sharding = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    return jax.lax.with_sharding_constraint(arrays, sharding)


def _multiple(size: int, mesh: Mesh) -> int:
    return math.ceil(size / mesh.size) * mesh.size
