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
from particlejax.config.job_specs import ProbeSpec
from particlejax.config.training import MeshSpec
from particlejax.core.typing import Params
from particlejax.data import pipeline
from particlejax.distributed import sharding
from particlejax.nn import heads
from particlejax.train import eval
from particlejax.train import stage as run

_BATCH_SIZE, _LEARNING_RATE, _WEIGHT_DECAY, _MAX_HEADS = 64, 2e-3, 0.05, 8


class ClipTokens(NamedTuple):
    """Labels int [N], -1 for unlabelled; x by modality: tokens float16 [N, L, D] and mask int32 [N,
    L].
    """

    label: np.ndarray
    x: dict[str, tuple[np.ndarray, np.ndarray]]


def split_key(spec: ProbeSpec, split: str) -> str:
    """The setting that names a split, for errors."""
    return "config.train_split" if split == spec.train_split else "config.test_split"


def collect_tokens(
    stage: run.Stage,
    params: Params,
    spec: ProbeSpec,
    split: str,
    inputs: tuple[str, ...],
    unreadable: run.UnreadableClips,
) -> ClipTokens:
    """Tokens of every readable clip of a split; inputs: single modalities, or 'all' for all
    together.
    """
    mesh = sharding.make_mesh(MeshSpec())
    stage, source = run.on_source(stage, split, split_key(spec, split))
    names = {"" if name == "all" else name: name for name in inputs}
    compute = eval.jit_tokens(stage.model, mesh, tuple(names))
    views, clip_tokens = stage.eval_batches(source, spec.batch_size), {}
    for loaded in pipeline.read_batches(views, 0, len(views), views.data):
        unreadable.record(loaded)
        outputs, clips = jax.tree.map(
            np.asarray, compute(params, sharding.shard_batch(loaded.batch, mesh))
        )
        for row, slot in zip(*np.nonzero(clips >= 0), strict=True):
            clip_tokens[int(clips[row, slot])] = {
                names[name]: x[row][segment[row] == slot + 1]
                for name, (x, segment) in outputs.items()
            }
    label = np.array([source[index].label for index in clip_tokens], int)
    return ClipTokens(
        label,
        {
            name: _pad_tokens([tokens_by_name[name] for tokens_by_name in clip_tokens.values()])
            for name in inputs
        },
    )


def _pad_tokens(token_arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(x) for x in token_arrays])
    x = np.zeros((len(token_arrays), max(1, lengths.max()), token_arrays[0].shape[-1]), np.float16)
    for i, tokens in enumerate(token_arrays):
        x[i, : len(tokens)] = tokens
    return x, (np.arange(x.shape[1])[None] < lengths[:, None]).astype(np.int32)


def accuracy(train: ClipTokens, test: ClipTokens, spec: ProbeSpec) -> dict[str, float]:
    """Top-1 accuracy on the labelled clips of `test`, by modality."""
    train_labeled, test_labeled = train.label >= 0, test.label >= 0
    classes, label = np.unique(train.label[train_labeled], return_inverse=True)
    accuracies = {}
    for name, (x, segment) in train.x.items():
        net = heads.AttentiveProbe(len(classes), math.gcd(_MAX_HEADS, x.shape[-1]))
        params = _train_probe(net, x[train_labeled], segment[train_labeled], label, spec)
        predicted = np.asarray(
            _predict(net, params, *(array[test_labeled] for array in test.x[name]))
        )
        accuracies[name] = float(np.mean(classes[predicted] == test.label[test_labeled]))
    return accuracies


def _train_probe(
    net: heads.AttentiveProbe,
    x: np.ndarray,
    segment: np.ndarray,
    label: np.ndarray,
    spec: ProbeSpec,
) -> Params:
    """Trains with AdamW and a cosine learning rate that falls to 0; each step samples new clips."""
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(_LEARNING_RATE, spec.attentive_steps),
        weight_decay=_WEIGHT_DECAY,
    )
    batch_size = min(_BATCH_SIZE, len(label))

    @jax.jit
    def fit(x: Array, segment: Array, label: Array, key: Array) -> Params:
        def step(state: tuple, key: Array) -> tuple:
            params, moments = state
            index = jax.random.choice(key, len(label), (batch_size,), replace=False)

            def loss(params: Params) -> Array:
                logits = net.apply({"params": params}, x[index].astype(jnp.float32), segment[index])
                return losses.cross_entropy(logits, label[index]).mean()

            updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
            return (optax.apply_updates(params, updates), moments), None

        params = net.init(key, x[:1].astype(jnp.float32), segment[:1])["params"]
        return jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(key, spec.attentive_steps)
        )[0][0]

    return fit(x, segment, label, jax.random.key(spec.seed % 2**32))


def _predict(
    net: heads.AttentiveProbe, params: Params, x: np.ndarray, segment: np.ndarray
) -> Array:
    def predict_clip(clip: tuple[Array, Array]) -> Array:
        logits = net.apply({"params": params}, clip[0][None].astype(jnp.float32), clip[1][None])
        return logits[0].argmax()

    return jax.jit(lambda *arrays: jax.lax.map(predict_clip, arrays, batch_size=_BATCH_SIZE))(
        x, segment
    )
