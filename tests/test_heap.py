# SPDX-License-Identifier: Apache-2.0
"""Memory that a process hands back is its own again, where nobody said otherwise."""

import os
import resource
import subprocess
import sys

import pytest

from particlejax import heap

PAGES = 64 * 2**20 // resource.getpagesize()
AGAIN = """
import resource
from particlejax import heap
print(int(heap.keep()))
number = 64 * 2**20  # not a constant expression, which the compiler would keep
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * number
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def again(**changes: str) -> tuple[bool, int]:
    """Whether memory is kept, and how many pages are cleared for an array as large as one that is gone."""
    told = ("GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD", "JAX_PLATFORMS")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(told)} | changes
    done = subprocess.run([sys.executable, "-c", AGAIN], env=environ, capture_output=True, text=True, check=True)
    kept, pages = map(int, done.stdout.split())
    return bool(kept), pages


def test_what_is_handed_back_needs_no_clearing() -> None:
    kept, pages = again(JAX_PLATFORMS="cpu")
    if not kept:
        pytest.skip("no glibc here")
    assert pages < 0.1 * PAGES < 0.9 * PAGES < again(JAX_PLATFORMS="cuda")[1]


@pytest.mark.parametrize("environ", [{"JAX_PLATFORMS": "cuda,cpu"}, {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "4"},
                                     {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}])
def test_an_accelerator_and_the_environment_have_their_way(environ: dict[str, str]) -> None:
    assert not heap.keep(environ)
