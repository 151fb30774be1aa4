# SPDX-License-Identifier: Apache-2.0
"""Evaluation: an objective's metrics over a split, and the class probabilities of each clip."""

from collections.abc import Callable
from typing import Any

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
from particlejax.models.particle_model import Model
from particlejax.nn.token_reduction import Tokens
from particlejax.objectives import registry
from particlejax.objectives.base import Objective
from particlejax.particles.types import Batch
from particlejax.train.log import Progress
from particlejax.train.stage import Stage

_KEY = 17  # seed of the evaluation masks, the same at every step so that curves compare
# called with every batch: records unreadable clips, stops the run on request
Watch = Callable[[pipeline.Loaded], None]


def jit_measure(
    objective: Objective, model: Model, mesh: Mesh
) -> Callable[[Params, Batch, int], tuple[Metrics, Any]]:
    """(params, batch, number) -> (metrics, clips in the batch), replicated over all processes."""

    def measure(params: Params, batch: Batch, number: int) -> tuple[Metrics, Any]:
        key = jax.random.fold_in(jax.random.key(_KEY), number)
        _, metrics = objective(params, model, batch, key, False)
        return metrics, jnp.sum(batch.clip >= 0)

    return jax.jit(sharding.on(mesh, measure), out_shardings=NamedSharding(mesh, P()))


def metrics_of(
    measure: Callable, params: Params, views: pipeline.Views, mesh: Mesh, watch: Watch
) -> dict[str, float]:
    """Means of all metrics over the clips of a split, with the same masks every time."""
    totals: dict[str, float] = {}
    clips = 0.0
    for k, loaded in enumerate(pipeline.read(views, 0, len(views), views.data)):
        watch(loaded)
        metrics, count = measure(params, sharding.put(loaded.batch, mesh), k)
        clips += float(count)
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value) * float(count)
    return {name: value / max(clips, 1.0) for name, value in totals.items()}


def metric_names(stage: Stage) -> tuple[str, ...]:
    """Names of the metrics of a stage's objectives, found without computing anything."""
    objective = registry.combine(stage.spec.objectives, stage.targets)

    def measure(key: Array, batch: Batch) -> Metrics:
        params = stage.model.init(key, batch)
        return objective(params, stage.model, batch, key, False)[1]

    return tuple(jax.eval_shape(measure, jax.random.key(0), stage.example))


def jit_predict(
    model: Model, mesh: Mesh, answers: Callable[[Any], Any] = jax.nn.softmax
) -> Callable[[Params, Batch], Any]:
    """(params, batch) -> (`answers` of the logits [B, S, C], clips [B, S]), replicated over all
    processes.
    """

    def predict(params: Params, batch: Batch) -> tuple[Any, Any]:
        tokens, _ = model.apply(params, "encode", batch.particles, batch.clip.shape[1])
        return answers(model.head(params, "head", tokens, batch.clip.shape[1])), batch.clip

    return jax.jit(sharding.on(mesh, predict), out_shardings=NamedSharding(mesh, P()))


def jit_features(
    model: Model, mesh: Mesh, modalities: tuple[str, ...] = ("",), compared: tuple[str, ...] = ()
) -> Callable[[Params, Batch], Any]:
    """(params, batch) -> (features of a frozen encoder by name, clips [B, S]).

    For each of `modalities` ('': all together) the mean token float32 [B, S, D] with only that
    input; under 'embed/NAME', for each of `compared`, the contrastive embeddings [B, S, E] (unit
    length).
    """

    def features(params: Params, batch: Batch) -> tuple[dict[str, Any], Any]:
        clips = batch.clip.shape[1]
        found = {}
        for name in dict.fromkeys((*modalities, *compared)):
            tokens = _tokens(model, params, batch, name)
            if name in modalities:
                found[name] = losses.clip_mean(
                    tokens.x.astype(jnp.float32), tokens.segment, clips, tokens.mass
                )
            if name in compared:
                found[f"embed/{name}"], *_ = model.head(params, "projection", tokens, clips, name)
        return found, batch.clip

    return jax.jit(sharding.on(mesh, features), out_shardings=NamedSharding(mesh, P()))


def jit_tokens(
    model: Model, mesh: Mesh, modalities: tuple[str, ...] = ("",)
) -> Callable[[Params, Batch], Any]:
    """(params, batch) -> ({modality: (tokens float16 [B, L, D], segments [B, L])}, clips [B, S]).

    The encoder is frozen and sees one modality at a time; '' means all together.
    """

    def compute(params: Params, batch: Batch) -> tuple[dict[str, Any], Any]:
        each = {name: _tokens(model, params, batch, name) for name in modalities}
        return {
            name: (tokens.x.astype(jnp.float16), tokens.segment) for name, tokens in each.items()
        }, batch.clip

    return jax.jit(sharding.on(mesh, compute), out_shardings=NamedSharding(mesh, P()))


def _tokens(model: Model, params: Params, batch: Batch, modality: str) -> Tokens:
    """Encodes one modality alone, or all if `modality` is ''."""
    shown = {modality: batch.particles[modality]} if modality else batch.particles
    return model.apply(params, "encode", shown, batch.clip.shape[1])[0]


def probabilities(
    predict: Callable, params: Params, views: pipeline.Views, mesh: Mesh, watch: Watch, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [N] of the readable clips and their probabilities [N, C], averaged over views.

    predict: from `jit_predict`.
    """
    numbers, found = per_clip(predict, params, views, mesh, watch, name)
    return numbers, np.zeros((0, 0)) if found is None else found


def per_clip(
    compute: Callable, params: Params, views: pipeline.Views, mesh: Mesh, watch: Watch, name: str
) -> tuple[np.ndarray, Any]:
    """Numbers [N] of the readable clips and a tree of [N, ...]: the results, averaged over views.

    compute: (params, batch) -> (a tree of [B, S, ...], clips [B, S]). The tree is None if no clip
    is readable.
    """
    sums: dict[int, Any] = {}
    counts: dict[int, int] = {}
    progress = Progress(name, len(views), unit="batch")
    for loaded in pipeline.read(views, 0, len(views), views.data):
        watch(loaded)
        found, clips = jax.tree.map(np.asarray, compute(params, sharding.put(loaded.batch, mesh)))
        for row, place in zip(*np.nonzero(clips >= 0), strict=True):
            clip = int(clips[row, place])
            each = jax.tree.map(lambda x, at=(row, place): x[at].astype(np.float64), found)
            sums[clip] = jax.tree.map(np.add, sums[clip], each) if clip in sums else each
            counts[clip] = counts.get(clip, 0) + 1
        progress.update()
    progress.close()
    numbers = sorted(sums)
    if not numbers:
        return np.zeros(0, int), None
    means = [jax.tree.map(lambda x, n=n: x / counts[n], sums[n]) for n in numbers]
    return np.array(numbers), jax.tree.map(lambda *each: np.stack(each), *means)
