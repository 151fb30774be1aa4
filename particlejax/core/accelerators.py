# SPDX-License-Identifier: Apache-2.0
"""Peak rates of accelerators, as published; rates of a CPU are measured."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# matmul side on CPUs and on others, bytes of the copy, repetitions
_CPU_MATRIX_SIZE, _ACCELERATOR_MATRIX_SIZE, _COPY_BYTES, _NUM_REPEATS = (1024, 8192, 2**26, 5)


class Chip(NamedTuple):
    """memory_bytes: bytes. peak_flops: bfloat16 FLOP/s. hbm_bandwidth: bytes/s of the main memory.

    ici_bandwidth: bytes/s sent to other chips over all links. clock_hz: Hz of the compiler's
    cycles. 0: unknown.
    """

    memory_bytes: float
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    clock_hz: float = 0.0
    measured: bool = False


# By prefix of the device kind, longer prefixes first. TPU: cloud.google.com/tpu/docs (system
# architecture; links in bits there); clock from FLOP/s = clock x units x side^2 x 2. GPU: data
# sheets, dense, NVLink in one direction.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(32 * 2**30, 275e12, 1228e9, 300e9, 1.05e9),
    "TPU v5 lite": Chip(16 * 2**30, 197e12, 819e9, 200e9, 1.5e9),
    "TPU v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9, 1.5e9),
    "TPU v5": Chip(95 * 2**30, 459e12, 2765e9, 600e9, 1.75e9),
    "TPU v6": Chip(32 * 2**30, 918e12, 1640e9, 448e9, 1.75e9),
    "NVIDIA A100": Chip(80 * 2**30, 312e12, 2039e9, 300e9),
    "NVIDIA H100 PCIe": Chip(80 * 2**30, 756e12, 2039e9, 64e9),  # PCIe instead of NVLink
    "NVIDIA H100": Chip(80 * 2**30, 989e12, 3350e9, 450e9),
    "NVIDIA H200": Chip(141e9, 989e12, 4800e9, 450e9),
    "NVIDIA B200": Chip(180e9, 2250e12, 8000e9, 900e9),
}


def chip_of(device: jax.Device, num_devices: int) -> Chip | None:
    """The chip of a device; each CPU device gets an equal share. None for an unknown kind."""
    if device.platform == "cpu":
        host = measure_host()
        return host._replace(
            peak_flops=host.peak_flops / num_devices, hbm_bandwidth=host.hbm_bandwidth / num_devices
        )
    return find_chip(device.device_kind)


def find_chip(kind: str) -> Chip | None:
    """The chip of a JAX device kind. None if it is not in the table."""
    return next((chip for name, chip in CHIPS.items() if kind.startswith(name)), None)


def measure_host() -> Chip:
    """Rates of this machine: the best of several float32 matmuls and copies; its devices
    communicate through memory.
    """
    buffer, copy = jnp.ones(_COPY_BYTES // 4), jax.jit(lambda x: x + 1)
    bandwidth = 2 * buffer.nbytes / _best_seconds(lambda: copy(buffer))
    return Chip(
        0.0,
        jax.local_device_count() * measure_matmul_flops(jnp.float32),
        bandwidth,
        0.0,
        measured=True,
    )


def measure_matmul_flops(dtype: Any) -> float:
    """FLOP/s of one local device in square matmuls with float32 accumulation, the best of several.

    All local devices multiply at once, as in training: they may share cores.
    """
    size = _CPU_MATRIX_SIZE if jax.default_backend() == "cpu" else _ACCELERATOR_MATRIX_SIZE
    matrices = [
        jax.device_put(jnp.ones((size, size), dtype), device) for device in jax.local_devices()
    ]
    matmul = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    return 2.0 * size**3 / _best_seconds(lambda: [matmul(matrix) for matrix in matrices])


def _best_seconds(fn: Callable[[], Any]) -> float:
    timings = []
    for _ in range(_NUM_REPEATS + 1):  # the first run compiles
        start = time.perf_counter()
        jax.block_until_ready(fn())
        timings.append(time.perf_counter() - start)
    return min(timings)
