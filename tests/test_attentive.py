# SPDX-License-Identifier: Apache-2.0
"""The attentive probe finds the token that a mean drowns; a run is probed as it was trained."""

import jax
import numpy as np
import pytest
import test_labels
from sklearn.linear_model import LogisticRegression

from particlejax.config.experiment import Experiment
from particlejax.config.job_specs import ProbeSpec
from particlejax.config.objectives import ClassifySpec
from particlejax.data import sources
from particlejax.jobs import attentive_probe, probe
from particlejax.objectives import label_targets
from particlejax.train import eval, stage


def test_an_attentive_probe_finds_the_token_that_a_mean_drowns() -> None:
    def made(count: int, seed: int) -> attentive_probe.ClipTokens:
        """Of some 30 tokens one says the class, the first number of the others being 0; the rest
        says nothing.
        """
        rng = np.random.default_rng(seed)
        x, label = rng.normal(size=(count, 32, 8)).astype(np.float16), rng.integers(0, 3, count)
        segment = (np.arange(32)[None] < rng.integers(20, 33, count)[:, None]).astype(np.int32)
        x[..., 0] = 0
        x[np.arange(count), 3] = 4 * np.eye(8)[label + 1] + 6 * np.eye(8)[0]
        x[segment == 0] = 9
        return attentive_probe.ClipTokens(
            np.where(np.arange(count) < count - 3, label, -1), {"all": (x, segment)}
        )

    learnt, asked = made(200, 0), made(100, 1)
    found = attentive_probe.accuracy(learnt, asked, ProbeSpec(attentive_steps=150))["all"]
    means = [
        np.average(x.astype(float), axis=1, weights=np.broadcast_to(segment[..., None], x.shape))
        for x, segment in (learnt.x["all"], asked.x["all"])
    ]
    linear = (
        LogisticRegression()
        .fit(means[0][:-3], learnt.label[:-3])
        .score(means[1][:-3], asked.label[:-3])
    )
    assert found > 0.8 > linear + 0.2, (found, linear)
    assert attentive_probe.accuracy(learnt, asked, ProbeSpec(attentive_steps=150))["all"] == found


@pytest.mark.parametrize("loss", ["sigmoid", "regression"])
def test_a_run_is_measured_with_the_loss_that_it_was_trained_with(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here on the first batch of a source with other labels than the run's."""
    classify = {"loss": loss, "label_smoothing": 0.0}
    experiment = Experiment.of(
        {
            "data": {"source": "folder:nowhere"},
            "stages": {"s": {"num_steps": 1, "objectives": {"classify": classify}}},
        }
    )
    built = stage.build_stage(experiment, "s", ("1", "3"))
    labels = ("3", "1|3", "1") if loss == "sigmoid" else ("3", "2", "1")
    source = sources.ListSource(labels, ())
    monkeypatch.setattr(sources, "open_source", lambda *args: source)
    logits = test_labels.LOGITS[..., : 2 if loss == "sigmoid" else 1]
    batch = test_labels.batch([0, 1, 2])

    def evaluate_metrics(evaluation: eval.Evaluation, *args: object) -> dict[str, float]:
        model = test_labels.Fixed(logits)
        objective = evaluation.objective
        return objective({"shift": 0.0}, model, batch, jax.random.key(0), False)[1]

    monkeypatch.setattr(eval, "evaluate_metrics", evaluate_metrics)
    unreadable = stage.UnreadableClips(0)
    found = probe.objective_metrics(built, {}, ProbeSpec(), unreadable)["classify/loss"]
    z = np.asarray(logits[:, 0])
    if loss == "sigmoid":
        p, true = 1 / (1 + np.exp(-z)), np.array([[0, 1], [1, 1], [1, 0]])
        expected = -(true * np.log(p) + (1 - true) * np.log(1 - p)).mean()
    else:  # of the run's numbers, the mean is 2 and the deviation 1
        expected = ((z[:, 0] - np.array([1, 0, -1])) ** 2).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_probes_of_several_classes_and_of_numbers() -> None:
    rng = np.random.default_rng(0)

    def figures(loss: str, labels: tuple[str, ...], index: np.ndarray) -> dict[str, float]:
        targets = label_targets.build_targets(ClassifySpec(loss=loss), labels)
        x = targets.table[index] @ rng.normal(size=(targets.table.shape[1], 8))
        x += 0.05 * rng.normal(size=x.shape)
        label = np.where(np.arange(len(index)) % 7 == 0, -1, index)
        split = probe.SplitFeatures(label, {"": x}, targets)
        return probe.classify_probes(split, split, ProbeSpec(knn_k=3))["all"]

    several = figures("sigmoid", ("a", "a|b", "b|c", "c", ""), rng.integers(0, 5, 60))
    numbers = figures("regression", tuple(str(i) for i in range(20)), rng.integers(0, 20, 60))
    assert several["linear"] > 0.95 and several["knn"] > 0.95, "mean average precision"
    assert numbers["linear"] > 0.95, "variance explained"


def test_retrieval_is_of_the_clips_that_have_both() -> None:
    one = np.eye(4)
    features = {
        "embed/text": one,
        "embed/vision": one[[0, 1, 2, 2]],
        "present/text": np.array([1.0, 1.0, 1.0, 0.0]),
        "present/vision": np.ones(4),
    }
    found = probe.retrieval(features)["vision to text"]
    assert found["R@1"] == 1.0 and found["median rank"] == 1.0 and found["clips"] == 3
    assert probe.retrieval(features | {"present/text": np.zeros(4)}) == {}
