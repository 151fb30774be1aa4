# SPDX-License-Identifier: Apache-2.0
"""Objectives: pure functions (params, model, batch, key, train) -> (loss, metrics), and the table of them.

The loss and each metric are means over the clips they apply to; `train` switches dropout, the key feeds masks too.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from particlejax import losses, masks
from particlejax.models.model import Model
from particlejax.objectives.classify import classify
from particlejax.objectives.pseudo import pseudo
from particlejax.objectives.targets import Targets
from particlejax.particles.types import Batch, Particles
from particlejax.spec import ClassifySpec, MaskedSpec
from particlejax.typing import Metrics, Params

Objective = Callable[[Params, Model, Batch, Array, bool], tuple[Array, Metrics]]


class Entry(NamedTuple):
    """An objective's maker and the parts of the model that it needs."""

    make: Callable[..., Objective]
    decoder: bool = False
    head: bool = False


def masked(spec: MaskedSpec) -> Objective:
    """Masked particle prediction (MAE, arXiv:2111.06377; VideoMAE, arXiv:2203.12602) over one modality."""

    def objective(params: Params, model: Model, batch: Batch, key: Array, train: bool) -> tuple[Array, Metrics]:
        parts = predict_masked(spec, params, model, batch, key, train)
        error = losses.squared_error(parts.predicted, parts.target)
        clips = batch.clip.shape[1]
        each = losses.clip_mean(error, parts.query.segment, clips)
        loss = losses.mean(each, batch.clip >= 0)
        return loss, {"loss": loss}

    return objective


class Prediction(NamedTuple):
    """What was asked, answered and true, [B, Q, ...], and the slots [B, K] that the encoder saw with their segments."""

    query: Particles
    predicted: Array
    target: Array
    visible: Particles


def predict_masked(spec: MaskedSpec, params: Params, model: Model, batch: Batch, key: Array, train: bool) -> Prediction:
    """Masks a batch, encodes what is left and predicts the rest; the report draws its pictures from this too."""
    mask_key, dropout_key = jax.random.split(key)
    whole = batch.particles[spec.modality]
    scores = masks.SCORES[spec.mask](mask_key, whole.place)
    visible, asked, visible_segment = masks.split(scores, whole.segment, spec.keep, spec.predict)
    seen = Particles(**{**vars(whole.take(visible)), "segment": visible_segment})
    query = whole.take(asked)
    particles = {**batch.particles, spec.modality: seen}
    tokens, _ = model.apply(params, "encode", particles, key=dropout_key if train else None)
    predicted = model.apply(params, "decode", tokens, query, spec.modality, key=None)
    target = losses.normalise_payload(query.payload) if spec.normalise else query.payload
    return Prediction(query, predicted, target, seen)


TABLE: dict[str, Entry] = {
    "masked": Entry(masked, decoder=True),
    "classify": Entry(classify, head=True),
    "pseudo": Entry(pseudo, head=True),
}


def combine(specs: Mapping[str, MaskedSpec | ClassifySpec], targets: Targets | None = None) -> Objective:
    """The weighted sum of objectives; metrics are 'loss' and, of each objective, 'name/metric'.

    targets: what labels ask of the head; None: each is a class.
    """
    made = {name: TABLE[name].make(spec, *([targets] if TABLE[name].head else [])) for name, spec in specs.items()}

    def objective(params: Params, model: Model, batch: Batch, key: Array, train: bool) -> tuple[Array, Metrics]:
        total, metrics = jnp.zeros(()), {}
        for i, (name, each) in enumerate(made.items()):
            loss, more = each(params, model, batch, jax.random.fold_in(key, i), train)
            total += specs[name].weight * loss
            metrics |= {f"{name}/{metric}": value for metric, value in more.items()}
        return total, {"loss": total} | metrics

    return objective


def parts(specs: Mapping[str, object]) -> dict[str, bool]:
    """Which parts of the model the objectives need: decoder, head."""
    return {part: any(getattr(TABLE[name], part) for name in specs) for part in ("decoder", "head")}


