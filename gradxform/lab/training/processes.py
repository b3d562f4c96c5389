"""One run on the devices of several processes, joined by ``jax.distributed``."""

import collections
import math
import re
import socket
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradxform.lab.training.batching import Batches
from gradxform.tree import PyTree

Devices = Sequence[Any]  # of jax.Device, which is no type to pyright

WHOLE = PartitionSpec()
PATIENCE = 300  # seconds to wait for the first process, as JAX does for the others


def join(where: str) -> bool:
    """Joins the other processes.

    Args:
      where: ``auto`` on a cluster that JAX knows, else ``HOST:PORT,PROCESS,PROCESSES``: the address
        of process 0, the number of this process, and how many there are.

    Returns:
      Whether this is process 0, which writes the results.

    Raises:
      ValueError: ``where`` is malformed, process 0 cannot listen or cannot be reached, or the
        processes have different numbers of devices. (If another process never starts, JAX ends
        process 0 after five minutes.)
    """
    options: dict[str, Any] = {}
    if where != "auto":
        found = re.fullmatch(r"(.+):([0-9]{1,5}),([0-9]{1,9}),([1-9][0-9]{0,8})", where)
        if not found or not 0 < int(found[2]) < 2**16:
            raise ValueError(
                "should be auto, or HOST:PORT,PROCESS,PROCESSES like localhost:1234,0,2"
            )
        host, (port, process, processes) = found[1], map(int, found.groups()[1:])
        if process >= processes:
            raise ValueError(f"of {processes} processes the last is number {processes - 1}")
        # in both cases JAX would only end the process, without a message
        if process == 0:
            _check_free(port)
        else:
            _wait_for(host, port)
        options = {"coordinator_address": f"{host}:{port}"}
        options |= {"num_processes": processes, "process_id": process}
    # the lab itself handles a request to stop, after the current epoch
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**options)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) != 1:
        each = ", ".join(str(counts[process]) for process in sorted(counts))
        raise ValueError(f"the processes have {each} devices; give all the same number")
    return jax.process_index() == 0


def _check_free(port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise ValueError(f"cannot listen at port {port}: {error.strerror}") from error


def _wait_for(host: str, port: int) -> None:
    """Returns once the first process listens."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            with socket.create_connection((host.strip("[]"), port), timeout=5):
                return
        except socket.gaierror as error:
            raise ValueError(f"no host is named {host}: {error.strerror}") from error
        except OSError:
            time.sleep(1)
    raise ValueError(f"process 0 did not start to listen there within {PATIENCE} s")


def mesh_of(axis: str, devices: Devices) -> Mesh:
    """A mesh with one axis; the compiler decides how intermediate arrays are divided."""
    return Mesh(np.asarray(devices), (axis,))


def put(x: Any, mesh: Mesh, spec: PartitionSpec = WHOLE) -> jax.Array:
    """A copy of ``x`` on the devices of all processes; every process must pass the same ``x``."""
    if _is_key(x):
        data = put(jax.random.key_data(x), mesh, spec)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: np.array(x[at]))


def put_all(arrays: PyTree, mesh: Mesh, spec: PartitionSpec = WHOLE) -> PyTree:
    """:func:`put` of every leaf."""
    return jax.tree.map(lambda x: put(x, mesh, spec), arrays)


def rows_of(mesh: Mesh) -> PartitionSpec:
    """Rows divided among the devices."""
    return PartitionSpec(*mesh.axis_names)


def put_rows(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """The rows of ``x`` divided among the devices; each process fills its own devices.

    The last row is repeated until the number of rows is a multiple of the number of devices.
    """
    rows = np.minimum(np.arange(_multiple(len(x), mesh)), len(x) - 1)
    shape, sharding = (len(rows), *x.shape[1:]), NamedSharding(mesh, rows_of(mesh))

    def part(at: Any) -> np.ndarray:
        return x[rows[at[0]]]

    return jax.make_array_from_callback(shape, sharding, part)


def read(x: jax.Array) -> np.ndarray:
    """``x`` on the host, including the parts of other processes; for random keys their data."""
    if _is_key(x):
        x = jax.random.key_data(x)
    if jax.process_count() > 1 and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def of_first(number: float, mesh: Mesh) -> float:
    """The ``number`` of process 0, where each process of the mesh has its own."""
    if len({device.process_index for device in mesh.devices.flat}) == 1:
        return number
    return float(multihost_utils.broadcast_one_to_all(np.float32(number)))


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    return bool(max(_of_each(flag)))


def least_of(number: float) -> float:
    """The smallest ``number`` over all processes."""
    return min(_of_each(number))


def _of_each(number: Any) -> list[Any]:
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return [number]
    return multihost_utils.process_allgather(np.asarray(number, np.float32)).tolist()


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


# -- inside a compiled program


def filled(batches: Batches, mesh: Mesh) -> Batches:
    """Fills batches up to a multiple of the number of devices, with examples of weight zero."""
    missing = _multiple(batches.indices.shape[1], mesh) - batches.indices.shape[1]
    return Batches(*(jnp.pad(x, ((0, 0), (0, missing))) for x in batches))


def divided(arrays: PyTree, mesh: Mesh) -> PyTree:
    """The rows of all arrays divided among the devices."""
    sharding = NamedSharding(mesh, rows_of(mesh))
    return jax.lax.with_sharding_constraint(arrays, sharding)


def _multiple(size: int, mesh: Mesh) -> int:
    return math.ceil(size / mesh.size) * mesh.size
