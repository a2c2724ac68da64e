"""Fixtures of the core's tests, and how their programs are compiled."""

import gc
import os
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import problems
import pytest

# Tests compile for minutes and run for seconds. On a CPU most of the former is a pipeline of MLIR
# passes for each fusion, which XLA can do without, and a thread for each piece of a small program.
# These jaxlibs know the flags; one that does not would abort. Flags of the caller come later and
# win; XLA reads them at the first compilation.
QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
GIVEN_FLAGS = os.environ.get("XLA_FLAGS", "")
if metadata.version("jaxlib").startswith(("0.8.", "0.9.")) and QUICK_FLAGS not in GIVEN_FLAGS:
    os.environ["XLA_FLAGS"] = f"{QUICK_FLAGS} {GIVEN_FLAGS}".strip()

# Tracing makes objects by the million that stay; looking through them all finds little garbage.
gc.set_threshold(50_000, 20, 100)


SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().split("\n"))
"""Tests that took over 2.5 s of a core by `pytest --durations=0`: by name, whole modules, or all of
a module with the same parameter, `module.py[parameter]`."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`make test` leaves out what is slow, `make test-all` nothing."""
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        module, _, test = name.partition("::")
        _, bracket, parameter = test.partition("[")
        if {name, module, f"{module}{bracket}{parameter}"} & SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def quick_compile():
    """Compile with few optimizations: the core's tests compile for minutes and run for seconds.

    One test runs a full-size step, in a process of its own, with all of them. What was compiled
    before goes: the setting is not part of JAX's keys, and the rounding of an initializer would
    depend on which modules ran earlier in this process.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    if not before:
        jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def x64():
    """64-bit mode for one test; what was set before returns after it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=[jnp.float32, jnp.float64], ids=["float32", "float64"])
def dtype(request):
    """Both precisions, each under the mode that makes it the default."""
    with jax.enable_x64(request.param is jnp.float64):
        yield request.param


@pytest.fixture(params=range(2), ids=["seed0", "seed1"])
def linear_gaussian(request, dtype):
    """A probabilistic PCA and the truth about it: one variance in float32, one a pixel in float64.

    Seeds share their compiled programs: take the problem as an argument, not by closing over it.
    """
    return problems.linear_gaussian(request.param, dtype, per_pixel=dtype is jnp.float64)
