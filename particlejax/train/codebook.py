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

from particlejax.config.objectives import MaskedVisualTokensSpec
from particlejax.core import tree
from particlejax.core.typing import UserError
from particlejax.data import pipeline
from particlejax.objectives.masked_tokens import codebook_name
from particlejax.train.log import log_info
from particlejax.train.stage import Stage, UnreadableClips
from particlejax.train.train_state import TrainState

_NUM_BATCHES = 8  # an equal number of particles is taken from each batch


def fit_codebook(state: TrainState, stage: Stage, batches: pipeline.TrainBatches) -> TrainState:
    """Puts the centers into the codebook of the parameters and of their EMA; a no-op without the
    objective.
    """
    spec = stage.spec.objectives.get("masked_visual_tokens")
    if spec is None:
        return state
    centers = kmeans_centers(sample_payloads(spec, stage, batches), spec, stage.experiment.seed)
    log_info(
        f"{stage.name}: fitted a codebook of {spec.codebook_size} visual tokens for {spec.modality}"
    )

    def replace_centers(name: str, leaf: Any) -> Any:
        if not name.endswith(f"{codebook_name(spec.modality)}/centres"):
            return leaf
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: centers[index].copy()
        )

    return replace(
        state,
        params=tree.map_named(replace_centers, state.params),
        average=tree.map_named(replace_centers, state.average),
    )


def sample_payloads(
    spec: MaskedVisualTokensSpec, stage: Stage, batches: pipeline.TrainBatches
) -> np.ndarray:
    """Payloads float32 [N, P] of particles from the first batches, normalized; identical in all
    processes.
    """
    rng, samples = np.random.default_rng(stage.experiment.seed), []
    all_rows = replace(batches, process_index=0, num_processes=1)
    unreadable = UnreadableClips(stage.data.max_unreadable)
    for loaded in pipeline.read_batches(
        all_rows, 0, min(_NUM_BATCHES, batches.steps or batches.plan.num_batches()), stage.data
    ):
        unreadable.record(loaded)
        particles = stage.model.normalize(loaded.batch).particles[spec.modality]
        payload = np.asarray(particles.payload)[np.asarray(particles.segment) > 0]
        sample = rng.permutation(len(payload))[: -(-spec.kmeans_samples // _NUM_BATCHES)]
        samples.append(payload[sample])
    return np.concatenate(samples)


def kmeans_centers(payloads: np.ndarray, spec: MaskedVisualTokensSpec, seed: int) -> np.ndarray:
    """Centers float32 [C, P] by k-means. Raises UserError if C exceeds the number of distinct
    payloads.
    """
    num_distinct = len(np.unique(payloads, axis=0))
    if num_distinct < spec.codebook_size:
        raise UserError(
            f"objectives.masked_visual_tokens: codebook_size={spec.codebook_size} exceeds the "
            f"{num_distinct} distinct particles: lower codebook_size or raise kmeans_samples."
        )
    kmeans = MiniBatchKMeans(spec.codebook_size, random_state=seed % 2**32, n_init=1).fit(payloads)
    return kmeans.cluster_centers_.astype(np.float32)
