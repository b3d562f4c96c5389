"""Eight virtual devices for every test, and float64 where a test asks for it."""

import os
from importlib.metadata import version

# small programs that run once: what they take is to be compiled
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# threads that wait for one another take a twentieth of the time, and so do the lines of Python
# that each operation of a program comes from
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# the older emitters take half the time, but JAX ends at a flag that is no more
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    )
)

import ctypes
import gc
import sys
from collections.abc import Iterator

import jax
import pytest

# GRADXFORM_STRICT=rank_promotion|dtype_promotion|leaks|nans runs the whole suite in that mode
_STRICT = {
    "rank_promotion": {"jax_numpy_rank_promotion": "raise"},
    "dtype_promotion": {"jax_numpy_dtype_promotion": "strict"},
    "leaks": {"jax_check_tracer_leaks": True},
    "nans": {"jax_debug_nans": True, "jax_debug_infs": True},
}
for _name, _value in _STRICT.get(os.environ.get("GRADXFORM_STRICT", ""), {}).items():
    jax.config.update(_name, _value)


def pytest_collection_finish() -> None:
    """Tracing makes many short-lived objects: to look for garbage so often takes a tenth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def free_memory() -> Iterator[None]:
    """Compiling leaves holes in the heap, which glibc returns to the system only if asked."""
    yield
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
        trim(0)


@pytest.fixture(scope="module")
def few_objects() -> Iterator[None]:
    """For modules that collect garbage often: what is older than the module is not looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 enabled for the time of the test."""
    with jax.enable_x64(True):
        yield
