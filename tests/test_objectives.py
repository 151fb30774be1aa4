# SPDX-License-Identifier: Apache-2.0
"""One battery for every objective of the table: finite, gradients where they belong, nothing leaks,
it learns what is there.

What cannot be learnt are clips of fresh noise: an objective whose loss fell on them would read the
answer off places, extents or numbers of particles.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from particlejax import losses, masks
from particlejax.config.experiment import Experiment, ModelSpec, ParticleSpec
from particlejax.config.fields import make
from particlejax.config.modalities import ordered
from particlejax.config.objectives import OBJECTIVES
from particlejax.core import tree
from particlejax.core.typing import UserError
from particlejax.models import particle_model as models
from particlejax.models.modality import ModalitySpec
from particlejax.nn.token_reduction import Tokens
from particlejax.objectives import contrastive, feature_distillation, masked, registry
from particlejax.objectives import masked_tokens as hidden_words
from particlejax.objectives.base import TEACHER
from particlejax.particles import cuboids, packing, policies
from particlejax.particles.types import Batch, Particles
from particlejax.train import eval

# compiles sooner
MODEL = ModelSpec(
    width=32,
    depth=2,
    num_heads=2,
    mlp_ratio=2,
    decoder_width=32,
    decoder_depth=1,
    decoder_num_heads=1,
    embed_dim=16,
    unroll_layers=False,
)
BASES = {"vision": (2, 4, 4), "audio": (2, 2, 1), "timeseries": (2, 1, 1)}
SLOTS = {
    "audio": packing.SlotSpec(12, 4),
    "video_features": packing.SlotSpec(6, 5),
    "timeseries": packing.SlotSpec(6, 4),
    "text": packing.SlotSpec(6, 1, "int32"),
    "vision": packing.SlotSpec(24, 96),
}
CLASSES, WORDS, ROWS = 4, 20, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective's settings, the modalities it is given, the least loss that noise allows, and
    what has no gradient.

    What has to be compared before it can be told (order, sync, match) stands still for some hundred
    steps before it is learnt.
    """

    spec: dict = dataclasses.field(default_factory=dict)
    modalities: tuple[str, ...] = ("vision",)
    floor: float = 0.0
    falls: float = 0.7  # to this share of the first loss on what can be learnt
    dead: tuple[str, ...] = ()
    steps: int = 80
    rate: float = 4e-3
    model: ModelSpec = MODEL


CASES = {
    "masked_autoencoder": Case(
        dict(mask_ratio=0.5, target_ratio=0.5, mask_type="random"), floor=0.97
    ),
    "jepa": Case(dict(mask_ratio=0.5, target_ratio=0.5, mask_type="motion")),
    # Noise of deviation one: a mean smooth L1 of 0.42 for who answers nothing.
    "feature_distillation": Case(
        dict(mask_ratio=0.3),
        ("video_features", "vision"),
        0.4,
        dead=("decoder/payload_vision", "decoder/modality_vision"),
    ),
    "future_prediction": Case(floor=0.97),
    "clip_order": Case(floor=0.9 * math.log(6), steps=200, rate=2e-3),
    "playback_speed": Case(floor=0.9 * math.log(2)),
    "arrow_of_time": Case(floor=0.9 * math.log(2)),
    "rotation_flip": Case(floor=0.9 * math.log(8)),
    "synchronization": Case(
        dict(max_shift=1, shift_stride=2, mismatch_prob=0.2),
        ("audio", "vision"),
        1.25,
        steps=560,
        rate=1e-3,
    ),
    "synchronization:correlation": Case(
        dict(max_shift=1, shift_stride=2, mismatch_prob=0.2, method="correlation"),
        ("audio", "vision"),
        1.25,
        steps=200,
    ),
    "contrastive": Case(
        dict(modalities=("vision", "text"), loss="sigmoid"), ("text", "vision"), 1.8
    ),
    "text_matching": Case(
        dict(),
        ("text", "vision"),
        0.6,
        steps=600,
        rate=5e-4,
        model=dataclasses.replace(MODEL, width=64, num_heads=4),
    ),
    "temporal_alignment": Case(dict(modality="vision", num_bins=3), floor=0.9 * math.log(3)),
    "masked_lm": Case(
        dict(mask_ratio=0.5),
        ("text", "vision"),
        0.9 * math.log(WORDS - 2),
        dead=("decoder/payload_vision", "decoder/modality_vision"),
    ),
    "masked_visual_tokens": Case(
        dict(mask_ratio=0.5, target_ratio=0.5, mask_type="random", codebook_size=6),
        ("text", "vision"),
        0.9 * math.log(6),
        dead=("codebook", "predictor/modality_text"),
    ),
    "framewise": Case(
        dict(),
        ("timeseries", "vision"),
        0.95,
        dead=("encoder/payload_timeseries", "encoder/modality_timeseries"),
    ),
    "classify": Case(dict(label_smoothing=0.1), floor=0.9 * math.log(CLASSES)),
    "pseudo_label": Case(dict(threshold=0.0)),
}


def video(i: int, frames: int = 12) -> np.ndarray:
    """Grows brighter in time, and from the lower right to the upper left; a flash comes at the
    clip's own moment.
    """
    t, y, x = np.meshgrid(np.arange(frames), np.arange(8), np.arange(8), indexing="ij")
    made = (
        0.15 * t - 0.2 * y - 0.1 * x + 0.3 * (i % CLASSES) * (y > 3) + 1.5 * (t // 2 == 1 + i % 4)
    )
    return np.repeat(made[..., None], 3, -1).astype(np.float32)


def clip(
    i: int, modalities: tuple[str, ...], policy: str = "grid", frames: int = 12
) -> packing.Clip:
    """`frames` of half a second each, a patch of sound and a value of the series for each, six
    words.
    """
    times = np.arange(frames, dtype=np.float32) / 2
    made = {}
    if "vision" in modalities:
        made["vision"] = policies.cut_clip(
            video(i, frames), times, ParticleSpec(policy, BASES["vision"], (2, 1, 1), 2)
        )
    if "audio" in modalities:
        loud = 2.0 * (np.arange(frames) // 2 == 1 + i % 4).astype(np.float32)
        place = np.stack([times + 0.25, 0.5 + 0 * times, 0.5 + 0 * times], axis=-1)
        made["audio"] = Particles(
            np.repeat(loud[:, None], 4, 1),
            place,
            np.full((frames, 3), [0.5, 1, 1], np.float32),
            np.ones(frames, np.int32),
        )
    if "timeseries" in modalities:  # when it flashes, and which clip it is
        values = np.stack(
            [2.0 * (np.arange(frames) // 2 == 1 + i % 4), np.full(frames, 0.5 * (i % CLASSES))],
            axis=-1,
        )
        base = BASES["timeseries"]
        made["timeseries"] = cuboids.cut_cuboids(
            values[:, None, None].astype(np.float32), times, cuboids.Tube(base, base), base
        )
    # of sub-clips of a second: how bright each fifth of its columns is
    if "video_features" in modalities:
        seen = video(i, frames).reshape(frames // 2, 2, 8, 8, 3).mean(axis=(1, 2, 4))[:, :5]
        middle = np.stack([times[1::2], 0.5 + 0 * times[::2], 0.5 + 0 * times[::2]], axis=-1)
        made["video_features"] = Particles(
            seen.astype(np.float32),
            middle,
            np.full((frames // 2, 3), 1, np.float32),
            np.ones(frames // 2, np.int32),
        )
    if "text" in modalities:
        row = np.stack(
            [np.full(6, 3.0), (np.arange(6) + 0.5) / 6, np.full(6, 0.5)], axis=-1
        ).astype(np.float32)
        ids = (2 + 4 * (np.arange(6) % 4) + i % 4).astype(np.int32)
        made["text"] = Particles(
            ids[:, None], row, np.full((6, 3), [6.0, 1 / 6, 1.0], np.float32), np.ones(6, np.int32)
        )
    return packing.Clip(made, i % CLASSES, i)


def make_batch(modalities: tuple[str, ...], empty_rows: int = 0) -> Batch:
    clips = [clip(i, modalities) for i in range(ROWS - empty_rows)]
    slots = {name: SLOTS[name] for name in modalities}
    return jax.tree.map(jnp.asarray, packing.pack(clips, range(len(clips)), slots, ROWS, 1))


def noisy(batch: Batch, key: jax.Array, noise: jax.Array) -> Batch:
    """The batch, or where `noise` is 1 fresh noise of its shape."""
    made = {}
    for i, (name, p) in enumerate(batch.particles.items()):
        own = jax.random.fold_in(key, i)
        fresh = (
            jax.random.randint(own, p.payload.shape, 2, WORDS)
            if name == "text"
            else jax.random.normal(own, p.payload.shape)
        )
        made[name] = dataclasses.replace(p, payload=jnp.where(noise > 0, fresh, p.payload))
    return dataclasses.replace(batch, particles=made)


def payloads_of(modalities: tuple[str, ...]) -> dict[str, ModalitySpec]:
    return {
        m: ModalitySpec(SLOTS[m].payload_size, WORDS * (m == "text"), BASES.get(m, ()))
        for m in modalities
    }


def setup(name: str, **changes: object) -> tuple[registry.Objective, models.Model]:
    case, name = CASES[name], name.partition(":")[0]
    specs = {name: make(OBJECTIVES[name], case.spec | changes, name)}
    payloads = payloads_of(case.modalities)
    model = models.build(
        case.model, payloads, heads=registry.heads(specs, CLASSES), unseen=registry.unseen(specs)
    )
    registry.check(specs, payloads)
    return registry.combine(specs), model


@functools.cache
def trained(name: str) -> tuple[dict, np.ndarray, np.ndarray, dict, dict, dict]:
    """Start, losses on what can be learnt and on noise, last metrics, the largest gradient of each
    parameter, and the end.
    """
    objective, model = setup(name)
    batch, optimizer = make_batch(CASES[name].modalities), optax.adam(CASES[name].rate)
    if name == "pseudo_label":
        batch = dataclasses.replace(batch, label=jnp.full_like(batch.label, -1))
    start = jax.jit(model.init)(jax.random.key(0), batch)

    @jax.jit
    def run(params: dict, noise: jax.Array) -> tuple:
        def step(state: tuple, key: jax.Array) -> tuple:
            params, moments, average, most = state
            new = noisy(batch, jax.random.fold_in(key, 1), noise)
            branch = {TEACHER: average} if name == "jepa" else {}
            (_, metrics), grads = jax.value_and_grad(
                lambda p: objective({**p, **branch}, model, new, key, True), has_aux=True
            )(params)
            updates, moments = optimizer.update(grads, moments)
            params = optax.apply_updates(params, updates)
            average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, params)
            return (
                params,
                moments,
                average,
                jax.tree.map(lambda m, g: jnp.maximum(m, jnp.abs(g).max()), most, grads),
            ), metrics

        most = jax.tree.map(lambda p: jnp.zeros(()), params)
        (params, _, _, most), metrics = jax.lax.scan(
            step,
            (params, optimizer.init(params), params, most),
            jax.random.split(jax.random.key(1), CASES[name].steps),
        )
        return metrics, most, params

    metrics, most, end = run(start, jnp.zeros(()))
    noise = run(start, jnp.ones(()))[0] if CASES[name].floor else metrics
    return start, np.asarray(metrics["loss"]), np.asarray(noise["loss"]), metrics, most, end


def test_the_battery_knows_every_objective() -> None:
    assert {name.partition(":")[0] for name in CASES} == set(registry.TABLE) == set(OBJECTIVES)


@pytest.mark.parametrize("name", CASES)
def test_finite_and_gradients_reach_every_parameter(name: str) -> None:
    *_, metrics, most, _ = trained(name)
    assert all(np.isfinite(values).all() for values in metrics.values())
    dead = {path for path, g in tree.flatten(most).items() if not g > 0}
    expected = (
        {path for path in tree.flatten(most) if path.startswith(CASES[name].dead)}
        if CASES[name].dead
        else set()
    )
    # A bias of the keys shifts all of a query's logits alike, so softmax takes no notice of it.
    assert {path for path in dead if not path.endswith("key/bias")} == expected


@pytest.mark.parametrize("name", CASES)
def test_it_learns_what_can_be_learnt(name: str) -> None:
    _, seen, _, metrics, *_ = trained(name)
    assert np.mean(seen[-10:]) < CASES[name].falls * np.mean(seen[:3]), seen
    if name == "jepa":
        assert metrics["jepa/feature_std"][-1] > 0.2, "features have not collapsed"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.floor])
def test_it_does_not_learn_what_cannot_be_learnt(name: str) -> None:
    noise = trained(name)[2]
    assert np.mean(noise[-10:]) > CASES[name].floor, noise


@pytest.mark.parametrize(
    "name", ["classify", "contrastive", "masked_lm", "masked_visual_tokens", "framewise"]
)
def test_rows_without_a_clip_count_for_nothing(name: str) -> None:
    objective, model = setup(name)
    params = trained(name)[0]
    loss = jax.jit(lambda b: objective(params, model, b, jax.random.key(1), False)[0])
    assert loss(make_batch(CASES[name].modalities, empty_rows=ROWS)) == 0
    # whose masks are drawn for the whole batch: fewer rows draw others
    if name not in ("masked_lm", "masked_visual_tokens"):
        partly = make_batch(CASES[name].modalities, empty_rows=3)
        np.testing.assert_allclose(
            loss(partly), loss(jax.tree.map(lambda x: x[:5], partly)), rtol=1e-5
        )


def constant_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws that are the same for every row, so that a row's loss does not depend on its batch."""

    def uniform(
        key: jax.Array,
        shape: tuple[int, ...] = (),
        dtype: type = jnp.float32,
        minval: float = 0.0,
        maxval: float = 1.0,
    ) -> jax.Array:
        steps = (jnp.arange(shape[-1]) + 0.5) / shape[-1]
        return jnp.broadcast_to(minval + (maxval - minval) * steps, shape).astype(dtype)

    def zeros(key: jax.Array, *args: object, dtype: type = jnp.float32) -> jax.Array:
        shape = next(arg for arg in args if isinstance(arg, tuple))
        return jnp.zeros(shape, dtype)

    monkeypatch.setattr(jax.random, "uniform", uniform)
    monkeypatch.setattr(jax.random, "bernoulli", functools.partial(zeros, dtype=bool))
    monkeypatch.setattr(jax.random, "randint", functools.partial(zeros, dtype=jnp.int32))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: jnp.zeros(shape, dtype))


# rows that lack a modality or a label: of each half of the batch another number
LACKING = {
    "vision": (0, 1, 2, 4),
    "text": (0, 2, 3, 5),
    "audio": (1, 2, 3, 6),
    "timeseries": (0, 1, 3, 7),
    "video_features": (1, 2, 3, 4),
    "label": (0, 1, 2, 5),
}
INEXACT = {
    "contrastive/loss",
    "contrastive/batch_recall_at_1",
    "jepa/feature_std",
    "masked_visual_tokens/codebook_perplexity",
}


def without_blocks(model: models.Model) -> models.Model:
    """The model with fixed functions as its encoder and decoders: compiles sooner, and each clip
    has its own loss.
    """

    def project(*values: jax.Array, width: int) -> jax.Array:
        x = jnp.concatenate(values, axis=-1)
        return jnp.sin(x @ np.random.default_rng(0).normal(size=(x.shape[-1], width)))

    def apply(params: dict, method: str, *args: Any, key: jax.Array | None = None) -> Any:
        if method == "encode":
            particles = [args[0][name] for name in ordered(args[0])]
            parts = [
                (project(p.payload, p.place, width=MODEL.width), p.place, p.segment)
                for p in particles
            ]
            return Tokens(*(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))), {}
        if args[0] in ("decoder", "predictor"):
            name, _, query, modality = args
            outputs = WORDS if modality == "text" else SLOTS[modality].payload_size
            width = MODEL.width if name == "predictor" else outputs
            return project(query.payload, query.place, width=width)
        return model.apply(params, method, *args, key=key)

    return model._replace(apply=apply)


def partly_lacking() -> Batch:
    batch = make_batch(tuple(SLOTS))
    lacks = {name: np.isin(np.arange(ROWS), rows)[:, None] for name, rows in LACKING.items()}
    particles = {
        name: dataclasses.replace(p, segment=jnp.where(lacks[name], 0, p.segment))
        for name, p in batch.particles.items()
    }
    label = jnp.where(lacks["label"], -1, batch.label)
    return dataclasses.replace(batch, particles=particles, label=label)


@pytest.mark.parametrize("method", ["joint", "correlation"])
def test_every_mean_is_over_the_clips_that_it_applies_to(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the rows of a split lie in batches, and however few of a batch's clips count."""
    constant_draws(monkeypatch)
    names = (
        [name for name in CASES if ":" not in name] if method == "joint" else ["synchronization"]
    )
    specs = {
        name: make(OBJECTIVES[name], CASES[name].spec | {"weight": 0.5}, name) for name in names
    }
    specs["synchronization"] = dataclasses.replace(specs["synchronization"], method=method)
    whole_model = models.build(
        MODEL, payloads_of(tuple(SLOTS)), registry.heads(specs, CLASSES), registry.unseen(specs)
    )
    model = without_blocks(whole_model)
    objective, batch, rng = registry.combine(specs), partly_lacking(), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype),
        jax.eval_shape(whole_model.init, jax.random.key(0), batch),
    )
    measure = jax.jit(lambda rows: objective.measure(params, model, rows, jax.random.key(0), False))

    def split_into(*batches: list[int]) -> dict[str, float]:
        parts = [jax.tree.map(lambda x, rows=rows: x[np.array(rows)], batch) for rows in batches]
        return eval.recombined(objective, [jax.device_get(measure(part)) for part in parts])

    expected = split_into([0, 1, 2, 3], [4, 5, 6, 7])
    assert all(np.isfinite(value) for value in expected.values())
    for order in ([0, 1, 2, 4], [3, 5, 6, 7]), ([7, 0, 5, 2], [1, 6, 3, 4]):
        found = split_into(*order)
        for name in expected.keys() - INEXACT - {"loss"}:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, err_msg=name)
        total = sum(0.5 * found[f"{name}/loss"] for name in names)
        np.testing.assert_allclose(found["loss"], total, rtol=1e-6)


@pytest.mark.parametrize(
    "name, mask",
    [
        ("masked_autoencoder", "random"),
        ("masked_autoencoder", "tube"),
        ("masked_autoencoder", "motion"),
        ("future_prediction", ""),
        ("masked_visual_tokens", "random"),
        ("masked_visual_tokens", "motion"),
    ],
)
def test_what_is_asked_for_is_never_seen(name: str, mask: str) -> None:
    _, model = setup(name)
    params, batch = trained(name)[0], make_batch(CASES[name].modalities)
    spec = make(
        OBJECTIVES[name],
        {"mask_ratio": 0.5, "mask_type": mask} if mask else {"split_range": (0.4, 0.7)},
        name,
    )
    predict = {
        "masked_autoencoder": masked.predict_masked,
        "future_prediction": masked.predict_future,
        "masked_visual_tokens": hidden_words.predict_codes,
    }[name]
    vision = batch.particles["vision"]

    def predicted(payload: jax.Array) -> tuple[jax.Array, masked.Prediction]:
        new = dataclasses.replace(
            batch,
            particles={**batch.particles, "vision": dataclasses.replace(vision, payload=payload)},
        )
        found = predict(spec, params, model, new, jax.random.key(3), False)
        return jnp.sin(found.predicted).sum(), found

    grads, found = jax.jit(jax.grad(predicted, has_aux=True))(vision.payload)
    seen = jnp.abs(grads).sum(-1) > 0
    ends, begins = vision.place[..., 0] + 0.5, found.query.place[..., 0] - 0.5
    for row in range(ROWS):
        shown = {
            tuple(p) for p in found.visible.place[row][found.visible.segment[row] > 0].tolist()
        }
        assert shown == {tuple(p) for p in vision.place[row][seen[row]].tolist()}, (
            "exactly the visible ones matter"
        )
        if name == "future_prediction":
            assert (
                ends[row][seen[row]].max() <= begins[row][found.query.segment[row] > 0].min() + 1e-3
            ), "the past alone"


@pytest.mark.parametrize("target", ["pixels", "residual"])
def test_a_rollout_reads_the_past_and_what_it_made_itself(target: str) -> None:
    _, model = setup("future_prediction")
    params, batch = trained("future_prediction")[0], make_batch(("vision",))
    vision, spec = (
        batch.particles["vision"],
        make(OBJECTIVES["future_prediction"], {"target": target}, "future_prediction"),
    )
    later = vision.place[..., 0] > 3

    def made(payload: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = dataclasses.replace(
            batch, particles={"vision": dataclasses.replace(vision, payload=payload)}
        )
        payload, seen, asked = masked.rollout(spec, params, model, new, 0.5, 3)
        return jnp.where(asked[..., None], payload, 0).sum(), (payload, seen, asked)

    grads, (payload, seen, asked) = jax.jit(jax.grad(made, has_aux=True))(vision.payload)
    np.testing.assert_array_equal(asked, later & (vision.segment > 0))
    np.testing.assert_array_equal(seen, ~later & (vision.segment > 0))
    np.testing.assert_array_equal(payload[~later], vision.payload[~later])
    assert (grads[later] == 0).all() and (jnp.abs(grads[~later]).sum(-1) > 0).any()


def test_a_change_is_asked_against_what_the_past_last_showed() -> None:
    _, model = setup("future_prediction")
    params, batch = trained("future_prediction")[0], make_batch(("vision",))
    plain, change = (
        masked.predict_future(
            make(OBJECTIVES["future_prediction"], {"target": target}, "future_prediction"),
            params,
            model,
            batch,
            jax.random.key(3),
            False,
        )
        for target in ("pixels", "residual")
    )
    last = masked.copy_last_frame(plain.visible, plain.query, model.payloads["vision"])
    np.testing.assert_allclose(change.target + last, plain.target, atol=1e-6)
    assert (jnp.abs(last).max(axis=-1) > 0)[plain.query.segment > 0].all()


def test_motion_masks_hide_what_moves_more_often() -> None:
    change = jnp.tile(jnp.arange(16.0), (64, 1))
    segment = jnp.ones((64, 16), jnp.int32)
    visible, _, _ = masks.split(
        masks.ranked_scores(jax.random.key(0), change, segment), segment, 0.5, 0.5
    )
    counts = np.bincount(np.asarray(visible).reshape(-1), minlength=16)
    assert counts[:4].mean() > 2 * counts[-4:].mean() > 0


def test_the_teacher_is_not_taught_and_its_features_do_not_leak() -> None:
    objective, model = setup("jepa")
    params, batch = trained("jepa")[0], make_batch(("vision",))
    other = jax.tree.map(lambda x: x * 1.1, params)
    vision = batch.particles["vision"]

    def loss(params: dict, teacher: dict, payload: jax.Array) -> jax.Array:
        new = dataclasses.replace(
            batch, particles={"vision": dataclasses.replace(vision, payload=payload)}
        )
        return objective({**params, TEACHER: teacher}, model, new, jax.random.key(3), True)[0]

    value, (taught, seen) = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)))(
        params, other, vision.payload
    )
    assert all((g == 0).all() for g in jax.tree.leaves(taught))
    assert ((jnp.abs(seen).sum(-1) > 0).sum(axis=1) == 12).all(), "only what the student sees: half"
    assert value != jax.jit(loss)(params, params, vision.payload), "the teacher's parameters count"


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
def test_the_encoder_never_sees_what_it_is_to_say(loss: str) -> None:
    """The teacher's features are the answer and nothing else; the share of the clip that is hidden
    counts for nothing.
    """
    objective, model = setup("feature_distillation", loss=loss)
    params, batch = trained("feature_distillation")[0], make_batch(("video_features", "vision"))

    def answer(payloads: dict[str, jax.Array]) -> jax.Array:
        new = {
            name: dataclasses.replace(p, payload=payloads[name])
            for name, p in batch.particles.items()
        }
        seen = {name: p for name, p in new.items() if name != "video_features"}
        shown = {
            **seen,
            "vision": feature_distillation.visible_particles(
                make(OBJECTIVES["feature_distillation"], CASES["feature_distillation"].spec, ""),
                model,
                seen["vision"],
                jax.random.key(0),
            ),
        }
        whole = dataclasses.replace(batch, particles=new)
        asked = masked.encode_and_decode(
            params, model, shown, whole.particles["video_features"], "video_features", whole, None
        )
        return jnp.sin(asked).sum()

    payloads = {name: p.payload for name, p in batch.particles.items()}
    grads = jax.jit(jax.grad(answer))(payloads)
    assert (grads["video_features"] == 0).all()
    assert ((jnp.abs(grads["vision"]).sum(-1) > 0).sum(axis=1) == round(0.7 * 24)).all()
    assert not {"payload_features", "modality_features"} & params["encoder"].keys(), (
        "it fits without"
    )
    value, metrics = jax.jit(lambda b: objective(params, model, b, jax.random.key(0), False))(batch)
    assert value == metrics["feature_distillation/loss"] and (
        loss == "smooth_l1"
        or abs(value + metrics["feature_distillation/cosine_similarity"] - 1) < 1e-5
    )


def test_what_is_never_seen_stands_in_no_other_objectives_way() -> None:
    together = (
        "temporal_alignment",
        "feature_distillation",
        "masked_autoencoder",
        "framewise",
        "masked_visual_tokens",
    )
    specs = {name: make(OBJECTIVES[name], CASES[name].spec, name) for name in together}
    modalities = ("video_features", "timeseries", "vision")
    model = models.build(
        MODEL, payloads_of(modalities), heads=registry.heads(specs), unseen=registry.unseen(specs)
    )
    batch, key = make_batch(modalities), jax.random.key(0)
    params = jax.eval_shape(model.init, key, batch)
    loss, metrics = jax.eval_shape(
        lambda p: registry.combine(specs)(p, model, batch, key, True), params
    )
    assert loss.shape == () and {f"{name}/loss" for name in specs} <= set(metrics)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_contrast_over_eight_devices_equals_one(loss: str) -> None:
    objective, model = setup("contrastive", loss=loss)
    params, batch = trained("contrastive")[0], make_batch(("text", "vision"), empty_rows=1)
    compute = jax.jit(
        jax.value_and_grad(lambda p, b: objective(p, model, b, jax.random.key(0), False)[0])
    )
    alone, grads = compute(params, batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), batch)
    together, others = compute(jax.device_put(params, NamedSharding(mesh, P())), spread)
    np.testing.assert_allclose(together, alone, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, others)


def test_hard_negatives_are_harder_and_are_learnt_too() -> None:
    (objective, model), (easy, _) = setup("text_matching", negatives="hard"), setup("text_matching")
    batch, optimizer, end = (
        make_batch(("text", "vision")),
        optax.adam(1e-3),
        trained("text_matching")[-1],
    )

    @jax.jit
    def run(params: dict) -> tuple:
        def step(state: tuple, key: jax.Array) -> tuple:
            params, moments = state
            next_one = easy(params, model, batch, key, False)[0]
            loss, grads = jax.value_and_grad(lambda p: objective(p, model, batch, key, True)[0])(
                params
            )
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), (loss, next_one)

        return jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(jax.random.key(2), 120)
        )[1]

    loss, next_one = run(end)
    assert np.isfinite(loss).all() and np.mean(loss[:20]) > np.mean(next_one[:20]) + 0.05
    assert np.mean(loss[-20:]) < 0.7 * np.mean(loss[:20]), loss


def test_contrast_losses_against_hand_computation() -> None:
    logits, there = (
        jnp.array([[2.0, 0.0, 9.0], [1.0, 3.0, 9.0], [9.0, 9.0, 9.0]]),
        jnp.array([True, True, False]),
    )
    rows = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2))]
    columns = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    np.testing.assert_allclose(
        contrastive.infonce(logits, there), np.mean(rows + columns), rtol=1e-5
    )
    pair = sum(math.log(1 + math.exp(z)) for z in (-2.0, 0.0, 1.0, -3.0)) / 2
    np.testing.assert_allclose(contrastive.sigmoid(logits, there), pair, rtol=1e-5)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="add it there"):
        registry.check({"masked_lm": OBJECTIVES["masked_lm"]()}, {"vision": None})
    stage = {"num_steps": 1, "objectives": {"feature_distillation": {}}}
    with pytest.raises(UserError, match="set model.fusion to 'early' or 'cross'"):
        Experiment.of({"stages": {"one": stage}, "model": {"fusion": "late"}})
    with pytest.raises(UserError, match="set config.stages.one.ema_decay"):
        Experiment.of({"stages": {"one": {"num_steps": 1, "objectives": {"jepa": {}}}}})


def test_losses_are_means_over_clips_not_rows() -> None:
    values = jnp.array([[1.0, 1.0, 3.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    segment = jnp.array([[1, 1, 2, 0], [1, 1, 1, 1]])
    each = losses.clip_mean(values, segment, 2)
    np.testing.assert_allclose(each, [[1, 3], [5, 0]])
    np.testing.assert_allclose(losses.mean(each, jnp.array([[True, True], [True, False]])), 3.0)


def test_cross_entropy_against_hand_computation() -> None:
    logits = jnp.array([[2.0, 0.0, -1.0]])
    log_p = np.log(np.exp([2.0, 0, -1]) / np.exp([2.0, 0, -1]).sum())
    np.testing.assert_allclose(
        losses.cross_entropy(logits, jnp.array([0]), 0.3),
        [-(0.8 * log_p[0] + 0.1 * log_p[1:].sum())],
        rtol=1e-5,
    )
