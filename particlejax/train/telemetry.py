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
from particlejax.train.log import say

_MIB = 2**20


@dataclass
class Gauge:
    """Counts between two lines of timing.jsonl on this process; all processes are alike.

    operations: FLOPs of one step over all devices; called once, after the step is compiled. peak:
    FLOP/s of one device, 0 if unknown. parts: number of parts of a batch; this process counts one.
    """

    operations: Callable[[], float]
    peak: float
    parts: int = 1
    clock: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    batches: int = 0
    clips: int = 0
    slots: int = 0  # filled slots
    whole: int = 0  # all slots
    _operations: float | None = None

    def begin(self) -> None:
        """Resets all counters."""
        self.clock, self.seconds, self.batches, self.clips, self.slots, self.whole = (
            time.monotonic(),
            {},
            0,
            0,
            0,
            0,
        )

    @contextmanager
    def spent(self, on: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Adds the seconds within to 'data', 'save' or 'measure', unless the device was busy
        throughout.
        """
        begun = time.monotonic()
        try:
            yield
        finally:
            if not unless():
                self.seconds[on] = self.seconds.get(on, 0.0) + time.monotonic() - begun

    def add(self, batch: Batch) -> None:
        """Counts a batch of this process."""
        self.batches += 1
        self.clips += int((batch.clip >= 0).sum())
        self.slots += sum(
            int((particles.segment > 0).sum()) for particles in batch.particles.values()
        )
        self.whole += sum(particles.segment.size for particles in batch.particles.values())

    def figures(self) -> dict[str, float]:
        """The counts, with seconds per step by cause; resets the counters. Evaluation is not
        training time.
        """
        spent, batches = self.seconds, self.batches
        elapsed = max(time.monotonic() - self.clock - spent.get("measure", 0.0), 1e-9)
        each = elapsed / batches
        data, save = (spent.get(on, 0.0) / batches for on in ("data", "save"))
        found = {
            "seconds_per_step": each,
            "seconds_data": data,
            "seconds_save": save,
            "seconds_compute": max(each - data - save, 0.0),
            "data_wait_fraction": data / each,
            "clips_per_second": self.clips * self.parts / elapsed,
            "particles_per_second": self.slots * self.parts / elapsed,
            "packing_efficiency": self.slots / self.whole,
            "particles_per_clip": self.slots / max(self.clips, 1),
        }
        found |= self._utilisation(each) | memory()
        self.begin()
        return found

    def _utilisation(self, seconds: float) -> dict[str, float]:
        """Model FLOPs utilization, the fraction of all devices' peak (MFU; arXiv:2204.02311,
        appendix B).
        """
        if not self.peak:
            return {}
        if self._operations is None:
            self._operations = self.operations()
        return {"mfu": self._operations / (seconds * self.peak * jax.device_count())}


def memory() -> dict[str, float]:
    """Peak memory in MiB of this process, and of its fullest device if the backend reports it."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB}
    used = [
        stats["peak_bytes_in_use"]
        for stats in (device.memory_stats() for device in jax.local_devices())
        if stats
    ]
    return found | ({"device_peak_mib": max(used) / _MIB} if used else {})


def peak_of(how: str, dtype: Any) -> float:
    """Peak FLOP/s of one device: 'table' looks up its kind (0 if unknown), 'measured' times
    products of `dtype`.
    """
    if how == "measured":
        return accelerators.product(dtype)
    chip = accelerators.known(jax.devices()[0].device_kind)
    return chip.product if chip else 0.0


@dataclass
class Trace:
    """A profiler trace of the first to last step of `steps`, in WORKDIR/profile; (0, 0): none."""

    workdir: Path
    steps: tuple[int, int]
    running: bool = False

    def before(self, step: int) -> None:
        """Call before a step starts."""
        if step == self.steps[0] and not self.running:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.running = True

    def after(self, step: int, result: Any) -> None:
        """Call after a step has started; waits for the last traced one."""
        if step >= self.steps[1]:
            self.stop(result)

    def stop(self, result: Any = None) -> None:
        """Stops the trace and writes it."""
        if self.running:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self.running = False
            say(f"profile: {self.workdir / 'profile'} (open it in TensorBoard or Perfetto)")


@dataclass
class Compilations:
    """Warns when the compiled step is compiled again, which should not happen."""

    stage: str
    step: Any
    seen: int = 1

    def check(self, number: int) -> None:
        """Call after a step has started."""
        now = self.step._cache_size()
        if now > self.seen:
            say(
                f"{self.stage}: step {number} triggered a recompilation: a shape, dtype or "
                "sharding changed."
            )
            self.seen = now
