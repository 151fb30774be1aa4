# SPDX-License-Identifier: Apache-2.0
"""Class means, rounds of active learning, pseudo-labels and averages of parameters, each by hand on
small numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from particlejax.config.job_specs import ActiveLearningSpec
from particlejax.config.objectives import PseudoLabelSpec
from particlejax.core.typing import UserError
from particlejax.distributed import checkpoint
from particlejax.finetune import restore, weight_average
from particlejax.objectives import base
from particlejax.objectives.pseudo_label import TEACHER, augmented_view, pseudo_label
from particlejax.particles.types import Batch, Particles
from particlejax.train import sample_selection
from particlejax.train.train_state import TrainState, make_step

FOUND = np.array([[2.0, 0.1], [1.0, 0.0], [0.0, 3.0], [0.1, 1.0], [5.0, 4.0]])


def test_the_nearest_class_mean() -> None:
    label = np.array([0, -1, 1, -1, -1])
    centres = sample_selection.class_centers(FOUND, label, 3)
    probabilities = sample_selection.nearest_center_probs(FOUND, centres)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (
        probabilities[:, :2].argmax(axis=1).tolist() == [0, 0, 1, 1, 0]
        and (probabilities[:, 2] == 0).all()
    ), "a class unseen"
    np.testing.assert_allclose(
        sample_selection.nearest_center_probs(7 * FOUND, centres),
        probabilities,
        err_msg="length is of no account",
    )


P = np.array(
    [[0.9, 0.05, 0.05], [0.34, 0.33, 0.33], [0.5, 0.49, 0.01], [0.6, 0.2, 0.2], [0.4, 0.3, 0.3]]
)


@pytest.mark.parametrize(
    "how, expected",
    [("entropy", [4, 3, 2]), ("margin", [2, 4, 3]), ("coreset", None), ("random", None)],
)
def test_a_round_chooses_what_is_open_and_what_it_says(
    how: str, expected: list[int] | None
) -> None:
    assert (
        set(sample_selection.STRATEGIES) == {"entropy", "margin", "coreset", "random"}
        and ActiveLearningSpec(how).strategy == how
    )
    open_to = np.array([True, False, True, True, True])
    found = sample_selection.STRATEGIES[how](P, FOUND, open_to, 3, 0)
    assert len(set(found)) == 3 and open_to[found].all()
    assert expected is None or found.tolist() == expected
    assert len(sample_selection.STRATEGIES[how](P, FOUND, open_to, 99, 0)) == 4, (
        "no more than there are"
    )


def test_the_core_set_is_what_is_far_from_all_that_is_known() -> None:
    around = np.deg2rad([0, 10, 90, 95, 180])
    found = sample_selection.coreset(
        P,
        np.stack([np.cos(around), np.sin(around)], -1),
        np.array([False, True, True, True, True]),
        2,
        0,
    )
    assert found[0] == 4 and found[1] == 2, (
        "opposite first; then 90 degrees, which is farther from both than 95"
    )


def test_means_of_parameters_and_their_refusal(tmp_path: object) -> None:
    one, two = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 6.0])}
    np.testing.assert_array_equal(weight_average.mean_params([one, two])["a"], [2, 4])
    weight_average.check_same_architecture(one, two, "two")
    with pytest.raises(
        UserError,
        match=r"two has \(1,\) for a where the first has \(2,\): only runs of one architecture",
    ):
        weight_average.check_same_architecture(one, {"a": jnp.zeros(1)}, "two")
    kept = checkpoint.Checkpoints(tmp_path, 2)
    for step, each in ((1, one), (2, two)):
        kept.save(step, {"params": each}, {})
    kept.close()
    assert checkpoint.valid_steps(tmp_path) == [1, 2]
    params = [restore.from_checkpoint(one, tmp_path, step)[0] for step in (1, 2)]
    np.testing.assert_array_equal(weight_average.mean_params(params)["a"], [2, 4])
    np.testing.assert_array_equal(restore.from_checkpoint(one, tmp_path)[0]["a"], two["a"])


class Linear:
    """Logits are the sum of a clip's payloads times w; a part of a clip has a part of its
    logits.
    """

    def apply(
        self, params: dict, method: str, first: object, clips: int = 1, key: object = None
    ) -> object:
        if method == "encode":
            seen = first["vision"]
            return jnp.einsum(
                "blp,pc->blc", seen.payload * (seen.segment > 0)[..., None], params["w"]
            ), {}
        raise NotImplementedError(method)

    def normalize(self, batch: Batch) -> Batch:
        return batch

    def head(self, params: dict, name: str, tokens: object, clips: int = 1) -> object:
        return tokens.sum(axis=1, keepdims=True)


def batch(label: list[int], clip: list[int]) -> Batch:
    rng, shape = np.random.default_rng(0), (len(label), 8)
    payload = rng.normal(size=(*shape, 3)).astype(np.float32)
    place = rng.uniform(size=(*shape, 3)).astype(np.float32)
    vision = Particles(
        jnp.asarray(payload), jnp.asarray(place), jnp.ones((*shape, 3)), jnp.ones(shape, jnp.int32)
    )
    one = jnp.array(label)[:, None]
    return Batch(
        {"vision": vision},
        one,
        jnp.array(clip)[:, None],
        jnp.ones(one.shape),
        jnp.full(one.shape, -1),
    )


PARAMS = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)}
KEY = jax.random.key(0)


def loss(spec: PseudoLabelSpec, params: dict, made: Batch) -> tuple[jax.Array, dict]:
    objective = base.single(pseudo_label(spec))
    return jax.jit(lambda params, made: objective(params, Linear(), made, KEY, True))(params, made)


def test_clips_without_a_label_are_taught_by_the_whole_of_themselves() -> None:
    made = batch([-1, -1, 2, -1], [0, 1, 2, -1])
    spec = PseudoLabelSpec(threshold=0.0)
    view_key, _ = jax.random.split(KEY)
    seen = jax.jit(lambda particles: augmented_view(spec, particles, view_key))(made.particles)
    whole, part = (
        Linear().apply(PARAMS, "encode", each)[0].sum(axis=1) for each in (made.particles, seen)
    )
    assert (seen["vision"].segment > 0).sum() == 4 * 4, "half of each clip's particles"
    each = optax.softmax_cross_entropy_with_integer_labels(part, whole.argmax(-1))
    np.testing.assert_allclose(loss(spec, PARAMS, made)[0], each[:2].mean(), rtol=1e-5)
    squared = ((jax.nn.softmax(part) - jax.nn.softmax(whole)) ** 2).mean(-1)
    np.testing.assert_allclose(
        loss(PseudoLabelSpec(threshold=0.0, target="soft"), PARAMS, made)[0],
        squared[:2].mean(),
        rtol=1e-5,
    )
    sure = jax.nn.softmax(whole).max(-1)[:2]
    between = float(sure.mean())
    found, metrics = loss(PseudoLabelSpec(threshold=between), PARAMS, made)
    assert metrics["confident_fraction"] == 0.5
    np.testing.assert_allclose(found, (each[:2] * (sure >= between)).sum() / 2, rtol=1e-5)
    assert loss(spec, PARAMS, batch([1, 2], [0, 1]))[0] == 0, "all have a label"


def test_nobody_learns_to_teach() -> None:
    """The target is no way for the gradient: neither through the teacher nor through the learner's
    own first answer.
    """
    made = batch([-1, -1], [0, 1])
    spec = PseudoLabelSpec(teacher="ema", target="soft", threshold=0.0)
    both = {**PARAMS, TEACHER: {"w": -PARAMS["w"]}}
    grads = jax.grad(lambda p: loss(spec, p, made)[0])(both)
    assert (grads[TEACHER]["w"] == 0).all() and jnp.abs(grads["w"]).max() > 0
    own = jax.grad(lambda p: loss(PseudoLabelSpec(target="soft", threshold=0.0), p, made)[0])(
        PARAMS
    )["w"]
    same = jax.grad(lambda p: loss(spec, {**p, TEACHER: PARAMS}, made)[0])(PARAMS)["w"]
    np.testing.assert_allclose(own, same, rtol=1e-5)


def test_the_step_gives_the_average_as_teacher() -> None:
    made = batch([-1, -1], [0, 1])
    spec = PseudoLabelSpec(
        teacher="ema", target="soft", threshold=0.0, noise_std=0.0, mask_ratio=0.0
    )
    teacher = {"w": -PARAMS["w"]}
    optimizer = optax.sgd(0.1)
    state = TrainState(
        jnp.zeros((), jnp.int32), jnp.uint32(0), PARAMS, optimizer.init(PARAMS), teacher
    )
    step = make_step(Linear(), pseudo_label(spec), optimizer, ema=0.9, accumulate=1)
    _, metrics = jax.jit(step)(state, made)
    logits = jnp.einsum("blp,pc->bc", made.particles["vision"].payload, PARAMS["w"])
    np.testing.assert_allclose(
        metrics["loss"], ((jax.nn.softmax(logits) - jax.nn.softmax(-logits)) ** 2).mean(), rtol=1e-4
    )
