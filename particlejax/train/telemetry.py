# SPDX-License-Identifier: Apache-2.0
"""Telemetry of a training run: time per step, throughput, MFU, memory, traces, recompilations."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from particlejax.core import accelerators
from particlejax.particles.types import Batch
from particlejax.train.log import log_info

_MIB = 2**20


@dataclass
class StepTimer:
    """Counts between two lines of timing.jsonl on this process; all processes are alike.

    step_flops: FLOPs of one step over all devices; called once, after the step is compiled. peak:
    FLOP/s of one device, 0 if unknown. num_parts: number of parts of a batch; this process counts
    one.
    """

    step_flops: Callable[[], float]
    peak_flops: float
    num_parts: int = 1
    start_time: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    num_batches: int = 0
    num_clips: int = 0
    filled_slots: int = 0  # filled slots
    total_slots: int = 0  # all slots
    _step_flops: float | None = None

    def reset(self) -> None:
        """Resets all counters."""
        (
            self.start_time,
            self.seconds,
            self.num_batches,
            self.num_clips,
            self.filled_slots,
            self.total_slots,
        ) = (time.monotonic(), {}, 0, 0, 0, 0)

    @contextmanager
    def measure_time(
        self, category: str, skip_if: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Adds the seconds within to 'data', 'save' or 'measure', unless the device was busy
        throughout.
        """
        start = time.monotonic()
        try:
            yield
        finally:
            if not skip_if():
                self.seconds[category] = self.seconds.get(category, 0.0) + time.monotonic() - start

    def add_batch(self, batch: Batch) -> None:
        """Counts a batch of this process."""
        self.num_batches += 1
        self.num_clips += int((batch.clip_index >= 0).sum())
        self.filled_slots += sum(
            int((particles.segment > 0).sum()) for particles in batch.particles.values()
        )
        self.total_slots += sum(particles.segment.size for particles in batch.particles.values())

    def summarize(self) -> dict[str, float]:
        """The counts, with seconds per step by cause; resets the counters. Evaluation is not
        training time.
        """
        spent, batches = self.seconds, self.num_batches
        elapsed = max(time.monotonic() - self.start_time - spent.get("measure", 0.0), 1e-9)
        seconds_per_step = elapsed / batches
        data, save = (spent.get(category, 0.0) / batches for category in ("data", "save"))
        metrics = {
            "seconds_per_step": seconds_per_step,
            "seconds_data": data,
            "seconds_save": save,
            "seconds_compute": max(seconds_per_step - data - save, 0.0),
            "data_wait_fraction": data / seconds_per_step,
            "clips_per_second": self.num_clips * self.num_parts / elapsed,
            "particles_per_second": self.filled_slots * self.num_parts / elapsed,
            "num_clips": self.num_clips,
            "packing_efficiency": self.filled_slots / self.total_slots,
            "particles_per_clip": self.filled_slots / max(self.num_clips, 1),
        }
        metrics |= self._model_flops_utilization(seconds_per_step) | memory_usage()
        self.reset()
        return metrics

    def _model_flops_utilization(self, seconds: float) -> dict[str, float]:
        """Model FLOPs utilization, the fraction of all devices' peak (MFU; arXiv:2204.02311,
        appendix B).
        """
        if not self.peak_flops:
            return {}
        if self._step_flops is None:
            self._step_flops = self.step_flops()
        return {"mfu": self._step_flops / (seconds * self.peak_flops * jax.device_count())}


def memory_usage() -> dict[str, float]:
    """Peak memory in MiB of this process, and of its fullest device if the backend reports it."""
    unit = 1 if sys.platform == "darwin" else 1024
    usage = {"host_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB}
    device_peaks = [
        stats["peak_bytes_in_use"]
        for stats in (device.memory_stats() for device in jax.local_devices())
        if stats
    ]
    return usage | ({"device_peak_mib": max(device_peaks) / _MIB} if device_peaks else {})


def peak_flops(mode: str, dtype: Any) -> float:
    """Peak FLOP/s of one device: 'table' looks up its kind (0 if unknown), 'measured' times
    products of `dtype`.
    """
    if mode == "measured":
        return accelerators.measure_matmul_flops(dtype)
    chip = accelerators.find_chip(jax.devices()[0].device_kind)
    return chip.peak_flops if chip else 0.0


@dataclass
class Profiler:
    """A profiler trace of the first to last step of `steps`, in WORKDIR/profile; (0, 0): none."""

    workdir: Path
    steps: tuple[int, int]
    running: bool = False

    def before_step(self, step: int) -> None:
        """Call before a step starts."""
        if step == self.steps[0] and not self.running:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.running = True

    def after_step(self, step: int, result: Any) -> None:
        """Call after a step has started; waits for the last traced one."""
        if step >= self.steps[1]:
            self.stop(result)

    def stop(self, result: Any = None) -> None:
        """Stops the trace and writes it."""
        if self.running:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self.running = False
            log_info(f"profile: {self.workdir / 'profile'} (open it in TensorBoard or Perfetto)")


@dataclass
class RecompileWarning:
    """Warns when the compiled step is compiled again, which should not happen."""

    stage: str
    step: Any
    num_compiled: int = 1

    def check(self, step_number: int) -> None:
        """Call after a step has started."""
        cache_size = self.step._cache_size()
        if cache_size > self.num_compiled:
            log_info(
                f"{self.stage}: step {step_number} triggered a recompilation: a shape, dtype or "
                "sharding changed."
            )
            self.num_compiled = cache_size
