"""Kronecker factors that are divided by rows over the devices of a mesh.

The mesh is that of ``jax.set_mesh``. Each device keeps and averages some rows of each factor. To
invert the factors, the devices exchange them, with one message for each.
"""

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec


def by_rows(factor: jax.Array) -> jax.Array:
    """A square factor, or a stack of them, by rows; as it is if the devices do not divide them."""
    mesh, shape = _mesh(), factor.shape
    if mesh is None or len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] % mesh.size:
        return factor
    spec = PartitionSpec(*[None] * (len(shape) - 2), mesh.axis_names, None)
    return jax.lax.with_sharding_constraint(factor, spec)


def gathered(factor: jax.Array) -> jax.Array:
    """The whole factor on each device."""
    if _mesh() is None:
        return factor
    # without the first constraint the compiler would gather the factors also where none is inverted
    return jax.lax.with_sharding_constraint(by_rows(factor), PartitionSpec())


def _mesh() -> AbstractMesh | None:
    """The mesh, if the compiler chooses the shardings on it."""
    mesh = jax.sharding.get_abstract_mesh()
    is_automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if mesh.size > 1 and is_automatic and not mesh.empty else None
