# SPDX-License-Identifier: Apache-2.0
"""The memory of a process that trains on CPUs: kept from step to step.

XLA asks for a step's gigabytes anew each time and hands them back, and the kernel clears every page of them again: a seventh of a
ViT-S step. Told to keep what is handed back, the C library gives the same pages to the next step.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping

_ARENAS, _MAPPED, _TRIM = -8, -4, -1  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD of glibc's malloc.h


def keep(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether memory is kept from now on; to be called before the first thread starts.

    Not with an accelerator, whose memory is its own and where many threads decode, nor where the environment says how to
    allocate (GLIBC_TUNABLES, MALLOC_..., LD_PRELOAD), nor without glibc.
    """
    if _accelerated(environ) or any(name.startswith(("GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD")) for name in environ):
        return False
    tell = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    return tell is not None and all([tell(_ARENAS, 1), tell(_MAPPED, 0), tell(_TRIM, 2**31 - 1)])


def _accelerated(environ: Mapping[str, str]) -> bool:
    """Whether JAX may find other devices than the CPU."""
    if platforms := environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    return bool(importlib.metadata.entry_points(group="jax_plugins")) or importlib.util.find_spec("libtpu") is not None
