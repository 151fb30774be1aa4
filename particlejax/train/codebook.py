# SPDX-License-Identifier: Apache-2.0
"""Visual tokens: k-means centers of the particles in a stage's first batches, fitted before step 1.

The centers are parameters without updates, so checkpoints, EMA parameters and later stages hold
them. A run stopped before its first checkpoint computes the same centers again.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from sklearn.cluster import MiniBatchKMeans

from particlejax.config.model import MaskedVisualTokensSpec
from particlejax.core import tree
from particlejax.core.typing import UserError
from particlejax.data import pipeline
from particlejax.objectives.masked_tokens import codebook_name
from particlejax.train.log import say
from particlejax.train.stage import Stage
from particlejax.train.train_state import TrainState

_BATCHES = 8  # an equal number of particles is taken from each batch


def fitted(state: TrainState, stage: Stage, batches: pipeline.Batches) -> TrainState:
    """Puts the centers into the codebook of the parameters and of their EMA; a no-op without the
    objective.
    """
    spec = stage.spec.objectives.get("masked_visual_tokens")
    if spec is None:
        return state
    found = centres(examples(spec, stage, batches), spec, stage.experiment.seed)
    say(
        f"{stage.name}: fitted a codebook of {spec.codebook_size} visual tokens for {spec.modality}"
    )

    def put(name: str, leaf: Any) -> Any:
        if not name.endswith(f"{codebook_name(spec.modality)}/centres"):
            return leaf
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: found[index].copy()
        )

    return replace(
        state, params=tree.map_named(put, state.params), average=tree.map_named(put, state.average)
    )


def examples(spec: MaskedVisualTokensSpec, stage: Stage, batches: pipeline.Batches) -> np.ndarray:
    """Payloads float32 [N, P] of particles from the first batches, normalized; identical in all
    processes.
    """
    rng, found = np.random.default_rng(stage.experiment.seed), []
    whole = replace(batches, process=0, processes=1)
    for loaded in pipeline.read(
        whole, 0, min(_BATCHES, batches.steps or batches.plan.batches()), stage.data
    ):
        particles = stage.model.normalize(loaded.batch).particles[spec.modality]
        payload = np.asarray(particles.payload)[np.asarray(particles.segment) > 0]
        some = rng.permutation(len(payload))[: -(-spec.kmeans_samples // _BATCHES)]
        found.append(payload[some])
    return np.concatenate(found)


def centres(payloads: np.ndarray, spec: MaskedVisualTokensSpec, seed: int) -> np.ndarray:
    """Centers float32 [C, P] by k-means. Raises UserError if C exceeds the number of distinct
    payloads.
    """
    different = len(np.unique(payloads, axis=0))
    if different < spec.codebook_size:
        raise UserError(
            f"objectives.masked_visual_tokens: codebook_size={spec.codebook_size} exceeds the "
            f"{different} distinct particles: lower codebook_size or raise kmeans_samples."
        )
    fit = MiniBatchKMeans(spec.codebook_size, random_state=seed % 2**32, n_init=1).fit(payloads)
    return fit.cluster_centers_.astype(np.float32)
