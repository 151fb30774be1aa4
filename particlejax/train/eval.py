# SPDX-License-Identifier: Apache-2.0
"""Evaluation: an objective's metrics over a split, and the class probabilities of each clip."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from particlejax import losses
from particlejax.core.typing import Metrics, Params
from particlejax.data import pipeline
from particlejax.distributed import sharding
from particlejax.losses import Mean
from particlejax.models.particle_model import Model
from particlejax.nn.token_reduction import Tokens
from particlejax.objectives import registry, time_utils
from particlejax.objectives.base import Measured, WeightedSum
from particlejax.particles.types import Batch
from particlejax.train.log import Progress
from particlejax.train.stage import Stage

_KEY = 17  # seed of the evaluation masks, the same at every step so that curves compare
# called with every batch: records unreadable clips, stops the run on request
BatchCallback = Callable[[pipeline.LoadedBatch], None]


class Evaluation(NamedTuple):
    """A stage's objectives and their compiled step (params, batch, number) -> Measured, which is
    replicated over all processes.
    """

    objective: WeightedSum
    step: Callable[[Params, Batch, int], Measured]


def jit_evaluation(objective: WeightedSum, model: Model, mesh: Mesh) -> Evaluation:
    """The evaluation of the objectives, compiled at its first batch."""

    def eval_step(params: Params, batch: Batch, batch_index: int) -> Measured:
        key = jax.random.fold_in(jax.random.key(_KEY), batch_index)
        return objective.measure(params, model, batch, key, False)

    step = jax.jit(sharding.with_mesh(mesh, eval_step), out_shardings=NamedSharding(mesh, P()))
    return Evaluation(objective, step)


def evaluate_metrics(
    evaluation: Evaluation,
    params: Params,
    views: pipeline.EvalBatches,
    mesh: Mesh,
    on_batch: BatchCallback,
) -> dict[str, float]:
    """The loss and all metrics over the clips of a split, with the same masks every time.

    Each is the mean over all clips of the split that it applies to, however they lie in batches;
    NaN where it applies to none.
    """
    parts: list[Measured] = []
    for batch_index, loaded in enumerate(pipeline.read_batches(views, 0, len(views), views.data)):
        on_batch(loaded)
        batch = sharding.shard_batch(loaded.batch, mesh)
        parts.append(jax.device_get(evaluation.step(params, batch, batch_index)))
    return recombined(evaluation.objective, parts)


def recombined(objective: WeightedSum, parts: Sequence[Measured]) -> dict[str, float]:
    """The loss and all metrics of a whole from those of its parts, in float64."""
    if not parts:
        return {}
    terms, metrics = (
        {name: _pooled([means[name] for means in by_part]) for name in by_part[0]}
        for by_part in zip(*parts, strict=True)
    )
    applied = [objective.weights[name] * mean.value for name, mean in terms.items() if mean.weight]
    values = {name: mean.value if mean.weight else math.nan for name, mean in metrics.items()}
    return dict(sorted(({"loss": sum(applied) if applied else math.nan} | values).items()))


def _pooled(means: Sequence[Mean]) -> Mean:
    """The mean over all parts of a whole, of those that it applies to."""
    weighted = [(float(value), float(weight)) for value, weight in means if weight > 0]
    total = sum(weight for _, weight in weighted)
    return Mean(sum(value * weight for value, weight in weighted) / (total or 1.0), total)


def metric_names(stage: Stage) -> tuple[str, ...]:
    """Names of the metrics of a stage's objectives, found without computing anything."""
    objective = registry.combine(stage.spec.objectives, stage.targets)

    def measure(key: Array, batch: Batch) -> Metrics:
        params = stage.model.init(key, batch)
        return objective(params, stage.model, batch, key, False)[1]

    return tuple(jax.eval_shape(measure, jax.random.key(0), stage.example))


def jit_predict(
    model: Model, mesh: Mesh, activate: Callable[[Any], Any] = jax.nn.softmax
) -> Callable[[Params, Batch], Any]:
    """(params, batch) -> (`activate` of the logits [B, S, C], clips [B, S]), replicated over all
    processes.
    """

    def predict(params: Params, batch: Batch) -> tuple[Any, Any]:
        tokens, _ = model.apply(params, "encode", batch.particles, batch.clip_index.shape[1])
        return activate(
            model.head(params, "head", tokens, batch.clip_index.shape[1])
        ), batch.clip_index

    return jax.jit(sharding.with_mesh(mesh, predict), out_shardings=NamedSharding(mesh, P()))


def jit_features(
    model: Model, mesh: Mesh, modalities: tuple[str, ...] = ("",), compared: tuple[str, ...] = ()
) -> Callable[[Params, Batch], Any]:
    """(params, batch) -> (features of a frozen encoder by name, clips [B, S]).

    For each of `modalities` ('': all together) the mean token float32 [B, S, D] with only that
    input; under 'embed/NAME', for each of `compared`, the contrastive embeddings [B, S, E] (unit
    length), and under 'present/NAME' whether the clip has that modality, float32 [B, S].
    """

    def compute_features(params: Params, batch: Batch) -> tuple[dict[str, Any], Any]:
        num_clips = batch.clip_index.shape[1]
        features = {}
        for name in dict.fromkeys((*modalities, *compared)):
            tokens = _tokens(model, params, batch, name)
            if name in modalities:
                features[name] = losses.clip_mean(
                    tokens.x.astype(jnp.float32), tokens.segment, num_clips, tokens.size
                )
            if name in compared:
                features[f"embed/{name}"], *_ = model.head(
                    params, "projection", tokens, num_clips, name
                )
                features[f"present/{name}"] = time_utils.present(
                    batch.particles[name], num_clips
                ).astype(jnp.float32)
        return features, batch.clip_index

    return jax.jit(
        sharding.with_mesh(mesh, compute_features), out_shardings=NamedSharding(mesh, P())
    )


def jit_tokens(
    model: Model, mesh: Mesh, modalities: tuple[str, ...] = ("",)
) -> Callable[[Params, Batch], Any]:
    """(params, batch) -> ({modality: (tokens float16 [B, L, D], segments [B, L])}, clips [B, S]).

    The encoder is frozen and sees one modality at a time; '' means all together.
    """

    def compute(params: Params, batch: Batch) -> tuple[dict[str, Any], Any]:
        tokens_by_modality = {name: _tokens(model, params, batch, name) for name in modalities}
        return {
            name: (tokens.x.astype(jnp.float16), tokens.segment)
            for name, tokens in tokens_by_modality.items()
        }, batch.clip_index

    return jax.jit(sharding.with_mesh(mesh, compute), out_shardings=NamedSharding(mesh, P()))


def _tokens(model: Model, params: Params, batch: Batch, modality: str) -> Tokens:
    """Encodes one modality alone, or all if `modality` is ''."""
    particles = {modality: batch.particles[modality]} if modality else batch.particles
    return model.apply(params, "encode", particles, batch.clip_index.shape[1])[0]


def predict_probabilities(
    predict: Callable,
    params: Params,
    views: pipeline.EvalBatches,
    mesh: Mesh,
    on_batch: BatchCallback,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [N] of the readable clips and their probabilities [N, C], averaged over views.

    predict: from `jit_predict`.
    """
    clip_indices, probs = mean_per_clip(predict, params, views, mesh, on_batch, name)
    return clip_indices, np.zeros((0, 0)) if probs is None else probs


def mean_per_clip(
    compute: Callable,
    params: Params,
    views: pipeline.EvalBatches,
    mesh: Mesh,
    on_batch: BatchCallback,
    name: str,
) -> tuple[np.ndarray, Any]:
    """Numbers [N] of the readable clips and a tree of [N, ...]: the results, averaged over views.

    compute: (params, batch) -> (a tree of [B, S, ...], clips [B, S]). The tree is None if no clip
    is readable.
    """
    sums: dict[int, Any] = {}
    counts: dict[int, int] = {}
    progress = Progress(name, len(views), unit="batch")
    for loaded in pipeline.read_batches(views, 0, len(views), views.data):
        on_batch(loaded)
        outputs, clips = jax.tree.map(
            np.asarray, compute(params, sharding.shard_batch(loaded.batch, mesh))
        )
        for row, slot in zip(*np.nonzero(clips >= 0), strict=True):
            clip = int(clips[row, slot])
            view_output = jax.tree.map(
                lambda x, position=(row, slot): x[position].astype(np.float64), outputs
            )
            sums[clip] = (
                jax.tree.map(np.add, sums[clip], view_output) if clip in sums else view_output
            )
            counts[clip] = counts.get(clip, 0) + 1
        progress.update()
    progress.close()
    clip_indices = sorted(sums)
    if not clip_indices:
        return np.zeros(0, int), None
    means = [jax.tree.map(lambda x, n=n: x / counts[n], sums[n]) for n in clip_indices]
    return np.array(clip_indices), jax.tree.map(lambda *leaves: np.stack(leaves), *means)
