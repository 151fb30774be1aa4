# SPDX-License-Identifier: Apache-2.0
"""The memory of a process that trains on CPUs: kept from step to step.

XLA asks for a step's gigabytes anew each time and hands them back, and the kernel clears every page
of them again: a sixth of a ViT-S step. Told to keep what is handed back, the C library gives the
same pages to the next step, to the main thread at least, so that thread has to run it: other
threads' heaps are small ones, and one heap for all makes those that decode wait for each other.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping

import jax

from particlejax.distributed import cluster

_MAPPED, _TRIM = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of glibc's malloc.h
_INLINE = "jax_cpu_enable_async_dispatch"


def keep(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether memory is kept and programs run in the thread that calls them from now on; before JAX
    looks for devices.

    Not with an accelerator, whose memory is its own, nor with several devices, which would wait for
    each other in one thread, nor where the environment says how to allocate (GLIBC_TUNABLES,
    MALLOC_..., LD_PRELOAD), nor without glibc.
    """
    told = any(name.startswith(("GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD")) for name in environ)
    if told or _accelerated(environ) or _several(environ) or _INLINE not in jax.config.values:
        return False
    tell = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if tell is None or not all([tell(_MAPPED, 0), tell(_TRIM, 2**31 - 1)]):
        return False
    jax.config.update(_INLINE, False)
    return True


def _accelerated(environ: Mapping[str, str]) -> bool:
    """Whether JAX may find other devices than the CPU."""
    if platforms := environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    return (
        bool(importlib.metadata.entry_points(group="jax_plugins"))
        or importlib.util.find_spec("libtpu") is not None
    )


def _several(environ: Mapping[str, str]) -> bool:
    forced = (
        "device_count" in environ.get("XLA_FLAGS", "")
        or jax.config.values.get("jax_num_cpu_devices", 1) > 1
    )
    return forced or cluster.several()
