"""Eight virtual devices for every test, and float64 where a test asks for it."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# small programs that run once: what they take is to be compiled
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 enabled for the time of the test."""
    with jax.enable_x64(True):
        yield
