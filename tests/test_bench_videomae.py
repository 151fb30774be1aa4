# SPDX-License-Identifier: Apache-2.0
"""The benchmark beside VideoMAE: works are the same size, are counted by the same rule, and are
compared within a repetition.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from particlejax.benchmarks import linen_videomae
from particlejax.benchmarks import videomae as peer
from particlejax.config.job_specs import BenchJob, BenchSpec
from particlejax.config.objectives import MaskedAutoencoderSpec
from particlejax.core.typing import UserError
from particlejax.jobs import config_files


@pytest.fixture(scope="module")
def experiment() -> BenchJob:
    config = config_files.load("experiments/bench/videomae.py:tiny").to_dict()
    return BenchJob.of(config | {"stage_order": ("pretrain", "finetune")})


def test_the_peer_and_ours_count_the_same_products(experiment: BenchJob) -> None:
    """Where all tokens go through the encoder the formula for VideoMAE is what our forward pass
    asks for, but for its places.
    """
    model = experiment.model
    task = peer._baseline_task(experiment, "finetune", False)
    stage = peer.run.build_stage(experiment, "finetune", peer._CLASSES)
    ours = peer._forward_flops(experiment, "finetune", peer._batch(stage)) / task.batch_size
    places = 2 * task.tokens * 51 * model.width
    assert task.tokens == 32 and task.payload == 1536 and task.hidden == 0
    # the mean of a clip is a product with who belongs to it
    pooling = 2 * task.tokens * model.width
    assert ours == linen_videomae.flops_per_clip(model, task) + places + pooling
    assert linen_videomae.flops_per_clip(
        model, task._replace(train=True)
    ) == 3 * linen_videomae.flops_per_clip(model, task)


def test_of_a_masked_task_the_encoder_sees_little(experiment: BenchJob) -> None:
    task = peer._baseline_task(experiment, "pretrain", True)
    assert task.hidden == 29 and isinstance(task.masked, MaskedAutoencoderSpec)
    deep = replace(experiment.model, depth=experiment.model.depth + 1)
    block = 3 * (2 * 3 * 32**2 * 12 + 4 * 3**2 * 32)  # three tokens, width 32
    assert (
        linen_videomae.flops_per_clip(deep, task)
        - linen_videomae.flops_per_clip(experiment.model, task)
        == block
    )


def test_half_as_many_adaptive_particles_are_at_most_half(experiment: BenchJob) -> None:
    half = replace(experiment.particles, policy="adaptive", budget=16)
    stage = peer.run.build_stage(replace(experiment, particles=half), "finetune", peer._CLASSES)
    filled = (peer._batch(stage).particles["vision"].segment > 0).sum(axis=1)
    assert (filled <= 16).all() and (filled >= 15).all()


def test_works_take_turns(experiment: BenchJob, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []
    monkeypatch.setattr(peer, "_matmul_rate", lambda dtype: 100e9)
    works = {
        name: peer.Workload(
            lambda number, name=name: turns.append((name, number)), 10, 1, "float32"
        )
        for name in ("ours, float32", "VideoMAE, float32")
    }
    twice = replace(experiment, bench=BenchSpec(repetitions=2, num_clips=24, dtypes=("float32",)))
    found = peer._measure(twice, works, 8, "task")
    assert turns == [(name, number) for number in (1, 3, 3) for name in works]
    assert set(found) == {*works, "products"} and found["VideoMAE, float32"]["times"] == {
        "VideoMAE, float32": 1.0
    }


def test_ratios_are_of_the_same_repetition() -> None:
    """A machine that is slow for one repetition changes nothing."""
    seconds = {"ours, float32": [1.0, 5.0, 2.0], "VideoMAE, float32": [2.0, 10.0, 4.0]}
    assert peer._speedups(seconds, "ours, float32") == {"times": {"VideoMAE, float32": 2.0}}
    work = peer.Workload(lambda number: None, 100, 7, "float32")
    found = peer._metrics(work, seconds["ours, float32"], [200.0, 40.0, 100.0])
    assert (
        found["utilisation"] == 0.5
        and found["clips_per_second"] == 0.5
        and found["flops_per_second"] == 50.0
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"objectives": {"clip_order": {}}}, "VideoMAE has 'masked_autoencoder' and 'classify'"),
        ({"particles": {"budget": 8}}, "set config.particles.policy='grid'"),
        ({"model": {"depth": 2}}, "own data, particles and model empty"),
    ],
)
def test_what_videomae_does_not_do_is_said(
    experiment: BenchJob, change: dict, sentence: str
) -> None:
    stages = {"finetune": replace(experiment.stages["finetune"], **change)}
    with pytest.raises(UserError, match=sentence):
        peer._baseline_task(
            replace(experiment, stages=stages, stage_order=("finetune",)), "finetune", True
        )


def test_a_type_that_does_not_pay_is_left_out(
    experiment: BenchJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linen_videomae, "_PACKAGES", ())
    both = replace(experiment, bench=BenchSpec(dtypes=("float32", "bfloat16")))
    for rate, kept in ((50e9, ("float32",)), (500e9, ("float32", "bfloat16"))):
        monkeypatch.setattr(
            peer, "_matmul_rate", lambda dtype, rate=rate: rate if dtype == "bfloat16" else 100e9
        )
        chosen, said = peer._select_dtypes(both)
        assert chosen.bench.dtypes == kept and len(said) == 2 - len(kept)
    monkeypatch.setattr(peer, "_matmul_rate", lambda dtype: 50e9)
    assert peer._select_dtypes(replace(both, bench=BenchSpec(dtypes=("bfloat16",))))[1] == []


def test_without_the_packages_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linen_videomae, "_PACKAGES", ("jax", "not_there_either"))
    assert (
        'not_there_either cannot be imported: run `pip install -e ".[peers]"`'
        in linen_videomae.unavailable_reason()
    )
    monkeypatch.setattr(linen_videomae, "_PACKAGES", ("jax",))
    assert linen_videomae.unavailable_reason() == ""


def test_torch_without_the_devices_of_jax_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linen_videomae, "_PACKAGES", ())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for has, said in ((False, "this torch cannot use the GPU that JAX uses"), (True, "")):
        monkeypatch.setitem(
            sys.modules,
            "torch",
            SimpleNamespace(cuda=SimpleNamespace(is_available=lambda has=has: has)),
        )
        assert said in linen_videomae.unavailable_reason() and bool(said) == bool(
            linen_videomae.unavailable_reason()
        )


def test_the_peer_trains_and_answers_where_it_is_installed(experiment: BenchJob) -> None:
    """Its parameters move, and its own counter of products agrees with the formula for
    classifying.
    """
    if linen_videomae.unavailable_reason():
        pytest.skip("no torch here")
    from torch.utils.flop_counter import FlopCounterMode

    task = peer._baseline_task(experiment, "finetune", False)
    times, parameters = linen_videomae.build_runner(experiment.model, task, "float32", 0)
    with FlopCounterMode(display=False) as counter:
        answer = times(1)
    assert np.isclose(
        counter.get_total_flops() / task.batch_size,
        linen_videomae.flops_per_clip(experiment.model, task),
        rtol=0.05,
    )
    assert parameters > 1e4 and np.allclose(answer.sum(-1), 1.0)
    for masked in (None, experiment.stages["pretrain"].objectives["masked_autoencoder"]):
        times, _ = linen_videomae.build_runner(
            experiment.model, task._replace(train=True, masked=masked), "bfloat16", 0
        )
        first = float(times(1))
        assert float(times(20)) < first and jax.default_backend() == "cpu"
