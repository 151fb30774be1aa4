# SPDX-License-Identifier: Apache-2.0
"""Strict settings for every test: eight CPU devices, no silent rank promotion, one toybox for
all.
"""

import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version

# what one test compiled serves the others and the processes that tests start
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Tests compile far more than they compute: the least optimised programs are ready in two thirds of
# the time.
os.environ["XLA_FLAGS"] += (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# the older fusions compile in half the time; an unknown flag ends XLA
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"

import absl.flags
import jax
import processes
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
absl.flags.FLAGS.mark_as_parsed()  # Grain's worker processes read a flag


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Ends what a test has started."""
    yield
    processes.end_all()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the session's toybox is rendered once."""
    return str(tmp_path_factory.mktemp("cache"))
