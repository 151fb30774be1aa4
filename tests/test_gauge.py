# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself: seconds add up, utilisation is a share of the peak, a step compiled
anew is said.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax.core import accelerators
from particlejax.particles.types import Batch, Particles
from particlejax.train import telemetry
from particlejax.train.telemetry import RecompileWarning, StepTimer


def batch(clips: int, particles: int) -> Batch:
    """Four rows of ten slots."""
    segment, clip = np.zeros((4, 10), np.int32), np.full((4, 1), -1, np.int32)
    segment.reshape(-1)[:particles], clip[:clips] = 1, 0
    empty = np.zeros((4, 10, 3), np.float32)
    return Batch(
        {"vision": Particles(empty, empty, empty, segment)},
        clip,
        clip,
        clip.astype(np.float32),
        clip,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a gauge reads: its one number."""
    now = [100.0]
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_seconds_of_a_step_add_up_and_rates_count_what_is_there(clock: list[float]) -> None:
    it = StepTimer(lambda: 8e9, peak_flops=1e12, start_time=clock[0])
    for on, seconds in (("data", 0.5), ("save", 1.0), ("measure", 20.0)):
        with it.measure_time(on):
            clock[0] += seconds
    with it.measure_time("data", skip_if=lambda: True):  # the device had work meanwhile
        clock[0] += 2.5
    it.add_batch(batch(3, 25))
    it.add_batch(batch(1, 5))
    found = it.summarize()
    # measuring is not training time
    each = {
        "seconds_per_step": 2.0,
        "seconds_data": 0.25,
        "seconds_save": 0.5,
        "seconds_compute": 1.25,
        "data_wait_fraction": 0.125,
        "clips_per_second": 1.0,
        "particles_per_second": 7.5,
        "packing_efficiency": 30 / 80,
        "particles_per_clip": 7.5,
        "mfu": 8e9 / (2.0 * 1e12 * jax.device_count()),
    }
    assert {name: pytest.approx(value) for name, value in each.items()} == {
        name: found[name] for name in each
    }
    assert found["host_peak_mib"] > 50
    it.add_batch(batch(4, 40))
    clock[0] += 1
    again = it.summarize()
    assert again["packing_efficiency"] == 1.0 and again["seconds_per_step"] == pytest.approx(1.0), (
        "each line begins anew"
    )


def test_the_peak_is_known_measured_or_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    assert telemetry.peak_flops("table", "float32") == 0.0, "of a CPU nobody knows it"
    assert "mfu" not in _figures(0.0)
    monkeypatch.setattr(accelerators, "_CPU_MATRIX_SIZE", 128)
    assert telemetry.peak_flops("measured", "float32") > 1e6

    class Chip:
        device_kind = "TPU v5 lite"

    monkeypatch.setattr(jax, "devices", lambda: [Chip()])
    assert telemetry.peak_flops("table", "float32") == 197e12


def _figures(peak: float) -> dict[str, float]:
    it = StepTimer(lambda: 1.0, peak)
    it.add_batch(batch(1, 1))
    return it.summarize()


def test_a_step_compiled_anew_is_said_once(capfd: pytest.CaptureFixture) -> None:
    step = jax.jit(lambda x: x + 1)
    watch = RecompileWarning("pretrain", step)
    for number, length in enumerate((3, 3, 4, 4), 1):
        step(jnp.zeros(length))
        watch.check(number)
    said = capfd.readouterr().err
    assert (
        said.count("triggered a recompilation") == 1 and "step 3 triggered a recompilation" in said
    )
