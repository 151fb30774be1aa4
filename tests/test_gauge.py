# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself: seconds add up, utilisation is a share of the peak, a step compiled anew is said."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax.particles.types import Batch, Particles
from particlejax.train import gauge
from particlejax.train.gauge import Compilations, Gauge


def batch(clips: int, particles: int) -> Batch:
    """Four rows of ten slots."""
    segment, clip = np.zeros((4, 10), np.int32), np.full((4, 1), -1, np.int32)
    segment.reshape(-1)[:particles], clip[:clips] = 1, 0
    empty = np.zeros((4, 10, 3), np.float32)
    return Batch({"vision": Particles(empty, empty, empty, segment)}, clip, clip, clip.astype(np.float32), clip)


def test_seconds_of_a_step_add_up_and_rates_count_what_is_there() -> None:
    it = Gauge(lambda: 8e9, peak=1e12)
    begun = time.monotonic()
    for on, seconds in (("data", 0.02), ("save", 0.04), ("measure", 0.2)):
        with it.spent(on):
            time.sleep(seconds)
    with it.spent("data", unless=lambda: True):  # the device had work meanwhile
        time.sleep(0.05)
    it.add(batch(3, 25))
    it.add(batch(1, 5))
    found = it.figures()
    whole = time.monotonic() - begun
    assert 0.01 <= found["seconds_data"] < 0.02 and 0.02 <= found["seconds_save"] < 0.04 and found["seconds_compute"] >= 0.025
    parts = sum(found[f"seconds_{part}"] for part in ("data", "save", "compute"))
    np.testing.assert_allclose(parts, found["seconds_per_step"])
    assert 2 * found["seconds_per_step"] <= whole - 0.2 + 1e-3, "measuring is not training time"
    np.testing.assert_allclose(found["clips_per_second"], 4 / (2 * found["seconds_per_step"]))
    np.testing.assert_allclose(found["particles_per_second"], 30 / (2 * found["seconds_per_step"]))
    np.testing.assert_allclose([found["fill"], found["particles_per_clip"]], [30 / 80, 30 / 4])
    np.testing.assert_allclose(found["mfu"], 8e9 / (found["seconds_per_step"] * 1e12 * jax.device_count()))
    assert found["host_mib"] > 50
    it.add(batch(4, 40))
    assert it.figures()["fill"] == 1.0, "each line begins anew"


def test_the_peak_is_known_measured_or_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gauge.peak_of("known", "float32") == 0.0, "of a CPU nobody knows it"
    assert "mfu" not in _figures(0.0)
    monkeypatch.setattr(gauge, "_SIDE", 128)
    assert gauge.peak_of("measured", "float32") > 1e6

    class Chip:
        device_kind = "TPU v5 lite"

    monkeypatch.setattr(jax, "devices", lambda: [Chip()])
    assert gauge.peak_of("known", "float32") == 197e12


def _figures(peak: float) -> dict[str, float]:
    it = Gauge(lambda: 1.0, peak)
    it.add(batch(1, 1))
    return it.figures()


def test_a_step_compiled_anew_is_said_once(capfd: pytest.CaptureFixture) -> None:
    step = jax.jit(lambda x: x + 1)
    watch = Compilations("pretrain", step)
    for number, length in enumerate((3, 3, 4, 4), 1):
        step(jnp.zeros(length))
        watch.check(number)
    said = capfd.readouterr().err
    assert said.count("was compiled anew") == 1 and "pretrain: step 3 was compiled anew" in said
