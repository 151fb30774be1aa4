# SPDX-License-Identifier: Apache-2.0
"""What labels ask: one class, several, a number, each by hand; and few of them: shots, lists, the
rest without labels.
"""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from particlejax import losses
from particlejax.config.experiment import DataSpec, Experiment, ParticleSpec
from particlejax.config.objectives import ClassifySpec
from particlejax.core.typing import UserError
from particlejax.data import label_subset, pipeline, sources
from particlejax.data.sources import folder
from particlejax.objectives import base, label_targets
from particlejax.objectives.classify import classify
from particlejax.particles.types import Batch
from particlejax.train import predictions, stage


class Fixed:
    """A model whose logits are given, another time another where there are two."""

    def normalize(self, batch: Batch) -> Batch:
        return batch

    def __init__(self, *logits: np.ndarray) -> None:
        self.logits = [jnp.asarray(each, jnp.float32) for each in logits]
        self.calls = 0

    def apply(self, params: dict, method: str, *args: object, key: object = None) -> object:
        return None, {}

    def head(self, params: dict, name: str, *args: object) -> object:
        self.calls += 1
        return self.logits[(self.calls - 1) % len(self.logits)] + params["shift"]


def batch(label: list[int], share: float = 1.0, other: int = -1) -> Batch:
    one = jnp.array(label)[:, None]
    return Batch({}, one, one, jnp.full(one.shape, share), jnp.full(one.shape, other))


def loss(
    spec: ClassifySpec,
    labels: tuple[str, ...],
    logits: np.ndarray,
    made: Batch,
    weight: np.ndarray | None = None,
) -> tuple[float, dict]:
    goal = label_targets.build_targets(spec, labels)
    goal = goal if weight is None else goal._replace(weight=weight)
    found, metrics = base.single(classify(spec, goal))(
        {"shift": 0.0}, Fixed(logits), made, jax.random.key(0), True
    )
    return float(found), metrics


LOGITS = np.array([[[2.0, 0.0, -1.0]], [[0.5, 1.0, 3.0]], [[0.0, 0.0, 0.0]]])
P = np.exp(LOGITS[:, 0]) / np.exp(LOGITS[:, 0]).sum(-1, keepdims=True)


def test_softmax_and_its_weights() -> None:
    found, metrics = loss(ClassifySpec(), ("a", "b", "c"), LOGITS, batch([0, 1, -1]))
    np.testing.assert_allclose(found, -np.log([P[0, 0], P[1, 1]]).mean(), rtol=1e-5)
    assert metrics["top1"] == 0.5, "a clip without a label counts for nothing"
    weighted, _ = loss(
        ClassifySpec(), ("a", "b", "c"), LOGITS, batch([0, 1, -1]), np.array([2.0, 0.5, 1.0])
    )
    np.testing.assert_allclose(weighted, -(np.log([P[0, 0], P[1, 1]]) * [2, 0.5]).mean(), rtol=1e-5)
    mixed, _ = loss(ClassifySpec(), ("a", "b", "c"), LOGITS[:1], batch([0], 0.25, 2))
    np.testing.assert_allclose(mixed, -(0.25 * np.log(P[0, 0]) + 0.75 * np.log(P[0, 2])), rtol=1e-5)
    alone, _ = loss(ClassifySpec(), ("a", "b", "c"), LOGITS[:1], batch([0], 0.25, -1))
    np.testing.assert_allclose(
        alone, -0.25 * np.log(P[0, 0]), rtol=1e-5, err_msg="mixed with a clip that has no label"
    )


def test_focal_forgets_what_is_known() -> None:
    found, _ = loss(ClassifySpec(focal_gamma=2.0), ("a", "b", "c"), LOGITS, batch([0, 1, -1]))
    p = np.array([P[0, 0], P[1, 1]])
    np.testing.assert_allclose(found, (-np.log(p) * (1 - p) ** 2).mean(), rtol=1e-5)
    sure = jax.grad(lambda x: losses.soft_cross_entropy(x, jnp.array([1.0, 0.0]), 2.0))(
        jnp.array([200.0, 0.0])
    )
    assert np.isfinite(sure).all(), "also where nothing is left to learn"


def test_binary_is_a_choice_for_each_class() -> None:
    labels = ("a|c", "b", "c")
    goal = label_targets.build_targets(ClassifySpec(loss="sigmoid"), labels)
    assert goal.names == ("a", "b", "c")
    np.testing.assert_array_equal(goal.table, [[1, 0, 1], [0, 1, 0], [0, 0, 1]])
    found, metrics = loss(ClassifySpec(loss="sigmoid"), labels, LOGITS, batch([0, 1, -1]))
    expected = optax.sigmoid_binary_cross_entropy(
        jnp.asarray(LOGITS[:2, 0], jnp.float32), goal.table[:2]
    ).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert metrics["exact_match"] == 0
    figures = predictions.multilabel_metrics(
        np.array([[0.9, 0.2, 0.8], [0.1, 0.6, 0.7]]),
        np.array([[1, 0, 1], [0, 1, 0]]) > 0,
        goal.names,
    )
    assert figures["exact_match"] == 0.5 and figures["mAP"] == 1.0
    np.testing.assert_allclose(figures["f1_micro"], 2 * 3 / (2 * 3 + 1))


def test_a_head_can_be_asked_about_other_labels() -> None:
    goal = label_targets.build_targets(ClassifySpec(loss="sigmoid"), ("a|c", "b"))
    np.testing.assert_array_equal(
        label_targets.remap_to_source(goal, ("b|a", "c", "")).table,
        [[1, 1, 0], [0, 0, 1], [0, 0, 0]],
    )
    with pytest.raises(
        UserError, match="label 'a.d' is not made of the trained run's classes .a, b, c.: rename it"
    ):
        label_targets.remap_to_source(goal, ("a|d",))
    number = label_targets.build_targets(ClassifySpec(loss="regression"), ("100", "300"))
    np.testing.assert_allclose(
        number.activate(label_targets.remap_to_source(number, ("250", "90")).table)[:, 0], [250, 90]
    )


def test_regression_learns_a_number_in_its_own_units(tmp_path: Path) -> None:
    labels = ("100", "300", "200")
    goal = label_targets.build_targets(ClassifySpec(loss="regression"), labels)
    logits = np.array([[[0.0]], [[1.0]]])
    _, metrics = loss(ClassifySpec(loss="regression"), labels, logits, batch([0, 1]))
    said = np.asarray(goal.activate(logits))[:, 0]
    np.testing.assert_allclose(metrics["mae"], np.abs(said[:, 0] - [100, 300]).mean(), rtol=1e-5)
    found = np.array([[110.0], [280.0], [5.0]])
    figures = predictions.score_predictions(
        goal, tmp_path / "p.csv", ["x", "y", "z"], np.array([0, 1, -1]), found, labels
    )
    assert (
        figures["num_clips"] == 2
        and np.isclose(figures["mae"], 15)
        and np.isclose(figures["r2"], 1 - 250 / 10000)
    )
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert [row["predicted"] for row in rows] == ["110", "280", "5"] and rows[2]["label"] == ""
    with pytest.raises(UserError, match="label 'walk' is not a number"):
        label_targets.build_targets(ClassifySpec(loss="regression"), ("1", "walk"))


@pytest.mark.parametrize("kind, size", [("softmax", 3), ("sigmoid", 3), ("regression", 1)])
def test_two_draws_that_agree_cost_nothing_more(kind: str, size: int) -> None:
    labels = ("1", "2", "3")
    spec = ClassifySpec(loss=kind, rdrop_weight=2.0)
    one, other = LOGITS[:2, :, :size], LOGITS[1:, :, :size] + 1.0

    def found(*logits: np.ndarray, train: bool = True) -> tuple[float, dict]:
        objective = base.single(classify(spec, label_targets.build_targets(spec, labels)))
        value, metrics = objective(
            {"shift": 0.0}, Fixed(*logits), batch([0, 1]), jax.random.key(0), train
        )
        return float(value), metrics

    once, _ = found(one, train=False)
    same, metrics = found(one, one)
    np.testing.assert_allclose(same, once, rtol=1e-5)
    assert metrics["rdrop_kl"] == 0
    apart, metrics = found(one, other)
    second, _ = found(other, train=False)
    np.testing.assert_allclose(
        apart, (once + second) / 2 + 2 * float(metrics["rdrop_kl"]), rtol=1e-5
    )
    if kind == "softmax":
        p, q = (np.asarray(jax.nn.softmax(x[:, 0])) for x in (one, other))
        kl = ((p * np.log(p / q)).sum(-1) + (q * np.log(q / p)).sum(-1)) / 2
        np.testing.assert_allclose(metrics["rdrop_kl"], kl.mean(), rtol=1e-4)


def test_rare_classes_count_more_and_all_clips_together_as_before() -> None:
    counts = jnp.array([100.0, 10.0, 0.0])
    weights = np.asarray(losses.class_weights(counts, 0.999))
    np.testing.assert_allclose(
        weights[1] / weights[0], (1 - 0.999**100) / (1 - 0.999**10), rtol=1e-4
    )
    np.testing.assert_allclose((weights * counts).sum(), counts.sum(), rtol=1e-5)
    assert weights[2] == 0
    inverse = np.asarray(losses.class_weights(counts, 1.0))
    np.testing.assert_allclose(inverse, np.array([1 / 100, 1 / 10, 0]) * 110 / 2, rtol=1e-6)


def test_positives_weigh_as_the_clips_without_the_class_over_those_with_it() -> None:
    labels, counts = ("a|b", "b", "c", ""), (1, 5, 2, 2)
    for pos_weight, expected in ((0.0, [9 / 1, 4 / 6, 8 / 2]), (3.0, [3, 3, 3])):
        spec = ClassifySpec(loss="sigmoid", pos_weight=pos_weight)
        targets = label_targets.with_class_weights(
            label_targets.build_targets(spec, labels), spec, counts
        )
        np.testing.assert_allclose(targets.pos_weight, expected, rtol=1e-6)
        objective = base.single(classify(spec, targets))
        found, _ = objective(
            {"shift": 0.0}, Fixed(LOGITS), batch([0, 1, -1]), jax.random.key(0), True
        )
        log_p, log_not_p = (np.asarray(jax.nn.log_sigmoid(z * LOGITS[:2, 0])) for z in (1, -1))
        table = targets.table[:2]
        by_hand = -(expected * table * log_p + (1 - table) * log_not_p).mean()
        np.testing.assert_allclose(found, by_hand, rtol=1e-5)
        assert targets.weights == {"pos_weight": targets.pos_weight.tolist()}
    everywhere = label_targets.build_targets(spec, ("a", "a|b"))
    balanced = ClassifySpec(loss="sigmoid", pos_weight=0.0)
    found = label_targets.with_class_weights(everywhere, balanced, (3, 1))
    assert found.pos_weight.tolist() == [1, 3], "a class of all clips has nothing to weigh against"


def test_clips_without_a_label_are_predicted_and_not_evaluated(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.mp4").touch()
    experiment = Experiment.of(
        {
            "data": {"source": f"folder:{tmp_path}"},
            "stages": {"s": {"num_steps": 1, "objectives": {"classify": {}}}},
        }
    )
    built = stage.build_stage(experiment, "s", ("a", "b"))
    with pytest.raises(UserError, match=r"no clip of .*\(train\) has a label .* job 'predict'"):
        stage.on_labeled_source(built)
    (tmp_path / "clips.csv").write_text("path,label\n0.mp4,b\n1.mp4,\n2.mp4,b\n")
    found, source = stage.on_labeled_source(built)
    assert found.classes == ("a", "b") and {source[i].label for i in range(len(source))} <= {1, -1}


CLIPS = [("k", 6), ("l", 4), ("", 3)]


def listed() -> sources.ListSource:
    records = [
        sources.Record(f"{name}{i}", "", j if name else -1)
        for j, (name, n) in enumerate(CLIPS)
        for i in range(n)
    ]
    return sources.ListSource(("k", "l"), tuple(records))


def test_shots_are_the_seed_s_and_nested() -> None:
    label = label_subset.labels(listed())
    drawn = {
        (seed, k): set(label_subset.draw_shots(label, k, seed, ("k", "l")))
        for seed in range(5)
        for k in (1, 3)
    }
    for (seed, k), numbers in drawn.items():
        assert np.bincount(label[list(numbers)]).tolist() == [k, k]
        assert drawn[seed, 1] <= numbers
    assert len({frozenset(drawn[seed, 1]) for seed in range(5)}) > 1
    with pytest.raises(UserError, match="class 'l' has 4 clips: use a smaller number"):
        label_subset.draw_shots(label, 5, 0, ("k", "l"))


def test_the_rest_comes_without_labels_as_often_as_asked_for(tmp_path: Path) -> None:
    source = listed()
    alone = label_subset.limit_labels(source, DataSpec(shots=2), 0)
    assert len(alone) == 4 and (label_subset.labels(alone) >= 0).all()
    data = DataSpec(shots=2, unlabelled_fraction=0.75)
    both = label_subset.limit_labels(source, data, 0)
    assert len(both) == len(source) and (label_subset.labels(both) >= 0).sum() == 4
    assert sorted(both[i].name for i in range(len(both))) == sorted(
        record.name for record in source.records
    )
    made = pipeline.TrainBatches(both, data, ParticleSpec(), seed=0, num_rows=8)
    seen = label_subset.labels(both)[[n for k in range(100) for n in made.clip_indices(k)]]
    assert abs((seen < 0).mean() - 0.75) < 0.02
    (tmp_path / "next.csv").write_text("path,why\nl0,x\nk5,y\n")
    chosen = label_subset.limit_labels(source, DataSpec(labelled_csv=str(tmp_path / "next.csv")), 0)
    assert [chosen[i].name for i in range(len(chosen))] == ["k5", "l0"]
    (tmp_path / "next.csv").write_text("path\nq\n")
    with pytest.raises(UserError, match="has clip 'q', which is not in the source"):
        label_subset.limit_labels(source, DataSpec(labelled_csv=str(tmp_path / "next.csv")), 0)
    with pytest.raises(UserError, match="cannot be combined"):
        label_subset.limit_labels(source, DataSpec(shots=1, train_fraction=0.5), 0)
    assert label_subset.limit_labels(source, DataSpec(), 0) is source


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"objectives": {"pseudo_label": {"teacher": "ema"}}},
            "the stage keeps no EMA: set its ema",
        ),
        (
            {"objectives": {"classify": {"rdrop_weight": 1.0}}},
            "compares two dropout samples but there is no dropout",
        ),
        (
            {"objectives": {"classify": {"loss": "sigmoid", "class_balance_beta": 0.9}}},
            "class_balance_beta needs loss='softmax'",
        ),
        (
            {"objectives": {"classify": {"loss": "sigmoid"}, "pseudo_label": {}}},
            "needs one class per clip",
        ),
        ({"objectives": {"classify": {"pos_weight": 2.0}}}, "pos_weight needs loss='sigmoid'"),
        ({"objectives": {"classify": {"loss": "regression"}}}, "label 'a' is not a number"),
    ],
)
def test_what_would_be_passed_over_in_silence_is_refused(changes: dict, sentence: str) -> None:
    experiment = Experiment.of({"stages": {"s": {"num_steps": 1, **changes}}})
    with pytest.raises(UserError, match=sentence):
        stage.build_stage(experiment, "s", ("a", "b"))


def test_labels_come_from_the_column_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text(
        "path,split,label,score\na.mp4,train,x,1.5\nb.mp4,val,y|x,2\n"
    )
    assert folder.open_folder(str(tmp_path), "train").classes == ("x", "y|x")
    scored = sources.open_source(f"folder:{tmp_path}#score", "val", "")
    assert scored.classes == ("1.5", "2") and scored[0].label == 1
    with pytest.raises(
        UserError, match="no column 'scor' .it has path, split, label, score.: use one"
    ):
        sources.open_source(f"folder:{tmp_path}#scor", "val", "")
