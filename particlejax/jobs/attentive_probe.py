# SPDX-License-Identifier: Apache-2.0
"""Attentive probe: attention pooling and a linear head, trained on all tokens of a frozen encoder.

Legend: N clips, L tokens of the longest clip, D width, C classes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from particlejax import losses
from particlejax.config.experiment import MeshSpec
from particlejax.config.jobs import ProbeSpec
from particlejax.core.typing import Params
from particlejax.data import pipeline, sources
from particlejax.distributed import sharding
from particlejax.nn import heads
from particlejax.train import eval
from particlejax.train import stage as run

_ROWS, _RATE, _DECAY, _HEADS = 64, 2e-3, 0.05, 8


class Tokens(NamedTuple):
    """Labels int [N], -1 for unlabelled; x by modality: tokens float16 [N, L, D] and mask int32 [N,
    L].
    """

    label: np.ndarray
    x: dict[str, tuple[np.ndarray, np.ndarray]]


def tokens(
    stage: run.Stage,
    params: Params,
    spec: ProbeSpec,
    split: str,
    shown: tuple[str, ...],
    bad: run.BadClips,
) -> Tokens:
    """Tokens of every readable clip of a split; shown: single modalities, or 'all' for all
    together.
    """
    mesh = sharding.make_mesh(MeshSpec())
    source = sources.open_source(stage.data.source, split, stage.data.cache_dir, stage.classes)
    names = {"" if name == "all" else name: name for name in shown}
    compute = eval.jit_tokens(stage.model, mesh, tuple(names))
    views, kept = stage.views(source, spec.batch_size), {}
    for loaded in pipeline.read(views, 0, len(views), views.data):
        bad.note(loaded)
        found, clips = jax.tree.map(np.asarray, compute(params, sharding.put(loaded.batch, mesh)))
        for row, place in zip(*np.nonzero(clips >= 0), strict=True):
            kept[int(clips[row, place])] = {
                names[name]: x[row][segment[row] == place + 1]
                for name, (x, segment) in found.items()
            }
    label = np.array([source[number].label for number in kept], int)
    return Tokens(label, {name: _padded([each[name] for each in kept.values()]) for name in shown})


def _padded(each: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(x) for x in each])
    x = np.zeros((len(each), max(1, lengths.max()), each[0].shape[-1]), np.float16)
    for i, own in enumerate(each):
        x[i, : len(own)] = own
    return x, (np.arange(x.shape[1])[None] < lengths[:, None]).astype(np.int32)


def accuracy(learnt: Tokens, asked: Tokens, spec: ProbeSpec) -> dict[str, float]:
    """Top-1 accuracy on the labelled clips of `asked`, by modality."""
    known, there = learnt.label >= 0, asked.label >= 0
    classes, label = np.unique(learnt.label[known], return_inverse=True)
    found = {}
    for name, (x, segment) in learnt.x.items():
        net = heads.AttentiveProbe(len(classes), math.gcd(_HEADS, x.shape[-1]))
        params = _trained(net, x[known], segment[known], label, spec)
        said = np.asarray(_answers(net, params, *(each[there] for each in asked.x[name])))
        found[name] = float(np.mean(classes[said] == asked.label[there]))
    return found


def _trained(
    net: heads.AttentiveProbe,
    x: np.ndarray,
    segment: np.ndarray,
    label: np.ndarray,
    spec: ProbeSpec,
) -> Params:
    """Trains with AdamW and a cosine learning rate that falls to 0; each step samples new clips."""
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(_RATE, spec.attentive_steps), weight_decay=_DECAY
    )
    rows = min(_ROWS, len(label))

    @jax.jit
    def train(x: Array, segment: Array, label: Array, key: Array) -> Params:
        def step(state: tuple, key: Array) -> tuple:
            params, moments = state
            index = jax.random.choice(key, len(label), (rows,), replace=False)

            def loss(params: Params) -> Array:
                logits = net.apply({"params": params}, x[index].astype(jnp.float32), segment[index])
                return losses.cross_entropy(logits, label[index]).mean()

            updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
            return (optax.apply_updates(params, updates), moments), None

        params = net.init(key, x[:1].astype(jnp.float32), segment[:1])["params"]
        return jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(key, spec.attentive_steps)
        )[0][0]

    return train(x, segment, label, jax.random.key(spec.seed))


def _answers(
    net: heads.AttentiveProbe, params: Params, x: np.ndarray, segment: np.ndarray
) -> Array:
    def answer(each: tuple[Array, Array]) -> Array:
        logits = net.apply({"params": params}, each[0][None].astype(jnp.float32), each[1][None])
        return logits[0].argmax()

    return jax.jit(lambda *each: jax.lax.map(answer, each, batch_size=_ROWS))(x, segment)
