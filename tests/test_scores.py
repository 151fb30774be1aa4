# SPDX-License-Identifier: Apache-2.0
"""Scores against what one counts by hand, and the report's pictures against the particles they
show.
"""

import json
from pathlib import Path

import numpy as np

from particlejax.config.experiment import ParticleSpec
from particlejax.particles import painting, policies
from particlejax.reports import markdown
from particlejax.train import classification_metrics

CLASSES = ("a", "b", "c")


def test_scores_are_what_one_counts_by_hand() -> None:
    probabilities = np.array(
        [[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5], [1, 0, 0]]
    )
    # the last is unlabelled
    found = classification_metrics.compute_metrics(
        probabilities, np.array([0, 1, 1, 0, -1]), CLASSES
    )
    assert (
        found["num_clips"] == 4
        and found["top1"] == 0.5
        and found["top5"] == 1.0
        and found["chance"] == 1 / 3
    )
    assert found["confusion"] == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert found["mean_class_accuracy"] == 0.5  # 'c' does not occur and does not count
    assert found["per_class"]["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    # confidences .6 right, .8 right, .5 and .5 wrong, the two share a bin of 15
    assert np.isclose(found["ece"], (0.4 + 0.2 + 2 * 0.5) / 4)
    assert classification_metrics.compute_metrics(probabilities, np.full(5, -1), CLASSES) == {
        "num_clips": 0
    }


def test_wilson_interval() -> None:
    known = {(118, 240): (0.429, 0.555), (0, 10): (0, 0.278), (0, 0): (0, 1)}
    for (successes, count), want in known.items():
        found = classification_metrics.wilson_interval(successes, count)
        assert np.allclose(found, want, atol=5e-4)


def test_headlines_have_the_main_figure_of_every_stage() -> None:
    test = {"top1": 118 / 240, "num_clips": 240, "chance": 1 / 12, "confusion": [], "top5": 0.9}
    results = {
        "pretrain": {"train": {"loss": 0.25}},
        "finetune": {"train": {"loss": 1.0}, "test": test},
        "regress": {"val": {"mae": 0.5, "rmse": 0.7, "num_clips": 8}},
        "unreadable": [],
    }
    assert markdown.headlines(results) == [
        "`pretrain`: loss 0.250 on `train`",
        "`finetune`: top-1 accuracy 49.2 % (95 % interval 42.9 to 55.5) on `test` "
        "(240 clips, chance 8.3 %)",
        "`regress`: mean absolute error 0.500 on `val` (8 clips)",
    ]


def test_mean_class_accuracy_does_not_follow_the_large_class() -> None:
    label = np.array([0] * 9 + [1])
    found = classification_metrics.compute_metrics(
        np.tile([0.9, 0.1, 0.0], (10, 1)), label, CLASSES
    )
    assert found["top1"] == 0.9 and found["mean_class_accuracy"] == 0.5


def test_painted_particles_are_the_clip_they_were_cut_from() -> None:
    rng = np.random.default_rng(0)
    video, times = rng.random((8, 32, 48, 3)).astype(np.float32), np.arange(8, dtype=np.float32) / 7
    spec = ParticleSpec(patch_size=(4, 8, 16))
    cut = policies.cut_clip(video, times, spec)
    blank = np.zeros(video.shape)
    order = rng.permutation(len(cut.segment))
    painted = painting.paint(
        cut.payload[order],
        cut.place[order],
        cut.extent[order],
        times,
        (32, 48),
        spec.patch_size,
        blank,
    )
    np.testing.assert_array_equal(painted, video)
    half = order[: len(order) // 2]
    painted = painting.paint(
        cut.payload[half],
        cut.place[half],
        cut.extent[half],
        times,
        (32, 48),
        spec.patch_size,
        blank,
    )
    shown = (painted == video).all(-1)
    assert shown.mean() == 0.5 and not painted[~shown].any()


def test_a_coarse_particle_fills_its_extent() -> None:
    video, times = np.ones((8, 32, 32, 3), np.float32), np.arange(8, dtype=np.float32)
    spec = ParticleSpec(policy="pyramid", patch_size=(2, 8, 8), num_levels=3)
    cut = policies.cut_clip(video, times, spec)
    coarsest = [len(cut.segment) - 1]
    painted = painting.paint(
        cut.payload[coarsest],
        cut.place[coarsest],
        cut.extent[coarsest],
        times,
        (32, 32),
        spec.patch_size,
        np.zeros(video.shape),
    )
    assert painted.all()


def test_a_report_draws_shares_only_where_there_are_some(tmp_path: Path) -> None:
    lines = [
        {"stage": "jepa", "split": "train", "step": step, "loss": 1.0, "jepa/feature_std": 0.5}
        for step in (1, 2)
    ]
    lines += [
        {"stage": "plain", "split": "train", "step": step, "loss": 1.0, "valid_fraction": 1.0}
        for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "results.json").write_text(
        json.dumps({name: {"train": {"loss": 1.0}} for name in ("jepa", "plain")})
    )
    said = markdown.write(tmp_path).read_text()
    assert (
        "report/jepa_shares.png" in said
        and (tmp_path / "report" / "jepa_shares.png").stat().st_size > 1000
    )
    assert "plain_shares.png" not in said and "plain_loss.png" in said
