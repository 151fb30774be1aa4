# SPDX-License-Identifier: Apache-2.0
"""Keeps freed memory in the process during CPU training.

XLA allocates and frees gigabytes in each step, and the kernel zeroes every page again: a sixth of a
ViT-S step. With these malloc settings, glibc reuses the pages in the next step, but only on the
main thread, which must therefore run the programs: other threads have small arenas, and a single
arena for all makes decoding threads wait for each other.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping

import jax

from particlejax.distributed import cluster

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of glibc's malloc.h
_ASYNC_DISPATCH = "jax_cpu_enable_async_dispatch"


def keep_heap(environ: Mapping[str, str] = os.environ) -> bool:
    """Keeps freed memory and runs programs in the calling thread, if applicable; returns whether it
    does. Call before JAX finds devices.

    Not applied with an accelerator, with several devices (they would wait for each other in one
    thread), if the environment configures malloc (GLIBC_TUNABLES, MALLOC_..., LD_PRELOAD), or
    without glibc.
    """
    configured = any(
        name.startswith(("GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD")) for name in environ
    )
    if (
        configured
        or _has_accelerator(environ)
        or _has_several_devices(environ)
        or _ASYNC_DISPATCH not in jax.config.values
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # missing in musl and macOS
    if mallopt is None or not all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)]):
        return False
    jax.config.update(_ASYNC_DISPATCH, False)
    return True


def _has_accelerator(environ: Mapping[str, str]) -> bool:
    """Whether JAX may find devices other than the CPU."""
    if platforms := environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    return (
        bool(importlib.metadata.entry_points(group="jax_plugins"))
        or importlib.util.find_spec("libtpu") is not None
    )


def _has_several_devices(environ: Mapping[str, str]) -> bool:
    forced = (
        "device_count" in environ.get("XLA_FLAGS", "")
        or jax.config.values.get("jax_num_cpu_devices", 1) > 1
    )
    return forced or cluster.is_multiprocess()
