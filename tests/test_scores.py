# SPDX-License-Identifier: Apache-2.0
"""Scores against what one counts by hand, and the report's pictures against the particles they
show.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from particlejax.config.experiment import ParticleSpec
from particlejax.config.objectives import ClassifySpec
from particlejax.objectives import label_targets
from particlejax.particles import painting, policies
from particlejax.reports import markdown, plots
from particlejax.train import classification_metrics, predictions

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


def test_class_names_are_no_words_of_a_report() -> None:
    names = ("accuracy", "macro avg", "weighted avg", "micro avg")
    label = np.array([0, 1, 1, 3])
    found = classification_metrics.compute_metrics(np.eye(4)[[0, 1, 0, 3]], label, names)
    assert list(found["per_class"]) == list(names)
    assert found["per_class"]["accuracy"] == {
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "support": 1,
    }
    assert found["per_class"]["weighted avg"]["support"] == 0


def test_labels_of_several_are_scored_each_by_itself() -> None:
    probabilities = np.array([[0.9, 0.2, 0.1], [0.6, 0.8, 0.1], [0.2, 0.7, 0.3]])
    target = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]]) > 0
    found = predictions.multilabel_metrics(probabilities, target, CLASSES)
    known = {"a": (5 / 6, 0.5, 0.5, 0.5, 2), "b": (1, 1, 1, 1, 2), "c": (None, 0, None, None, 0)}
    for name, figures in known.items():
        assert tuple(found["per_class"][name].values()) == pytest.approx(figures)
    assert found["f1_micro"] == pytest.approx(2 * 3 / (4 + 4))
    assert found["f1_macro"] == pytest.approx((0.5 + 1 + 0) / 3)
    alone = predictions.multilabel_metrics(probabilities[:, :1], target[:, :1], ("a",))
    assert alone["f1_micro"] == alone["f1_macro"] == alone["per_class"]["a"]["f1"] == 0.5


def test_a_report_of_many_classes_is_bounded_and_survives_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    classes = tuple(f"class ${i}" for i in range(400))
    targets = label_targets.build_targets(ClassifySpec(), classes)
    label = np.repeat(np.arange(399), 2)  # the last class has no clip
    probs = np.eye(400, dtype=np.float32)[label]
    probs[-2:] = np.eye(400)[7]  # the worst class that has clips
    path, names = tmp_path / "predictions_s_val.csv", [str(i) for i in range(len(label))]
    found = predictions.score_predictions(targets, path, names, label, probs, classes)
    matrix = classification_metrics.read_confusion(tmp_path / found["confusion_file"])
    assert matrix.sum() == 798 and matrix[398, 7] == 2 and matrix[7, 7] == 2
    assert "confusion" not in found, "the file has it"
    few = classification_metrics.compute_metrics(np.eye(3)[[0, 1]], np.array([0, 1]), CLASSES)
    results = {"s": {"val": found}, "t": {"val": few}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    said = markdown.write(tmp_path).read_text()
    picture = plt.imread(tmp_path / "report/s_val_confusion.png")
    assert max(picture.shape) < 3000 and "The 60 of 400 classes with most errors" in said
    rows = [line for line in said.splitlines() if line.startswith("| class $")]
    assert len(rows) == 200 and rows[0].startswith("| class $398 | 0.000 | 0.000 (0.000 to 0.658)")
    assert "Without a clip here, and so not judged (1): class $399." in said
    assert "class $398 as class $7 (2)" in said
    top = [line for line in said.splitlines() if line.startswith("| clips | top-1")]
    assert ["top-5" in line for line in top] == [True, False], "of more than five classes alone"
    assert "| 2 | 1.000 (0.342 to 1.000) |" in said

    def fail(*args: object, **options: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(plots, "confusion", fail)
    capfd.readouterr()
    markdown.write_report(tmp_path)
    err = capfd.readouterr().err
    assert err.count("_confusion.png cannot be drawn (MemoryError: no room): left out.\n") == 2
    assert "confusion_s_val.csv" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(markdown, "headlines", fail)
    markdown.write_report(tmp_path)
    assert "report.md cannot be written (MemoryError: no room); all" in capfd.readouterr().err


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
