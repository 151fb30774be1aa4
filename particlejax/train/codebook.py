# SPDX-License-Identifier: Apache-2.0
"""Visual words: centres found by k-means among the particles of a stage's first batches, before its
first step.

They are parameters that nothing trains, so whatever holds the model holds them: checkpoints,
averages, a stage that starts from this one. A run that is stopped before its first checkpoint finds
the same ones again.
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

_BATCHES = 8  # from which as many particles are taken each


def fitted(state: TrainState, stage: Stage, batches: pipeline.Batches) -> TrainState:
    """The state with the centres of its codebook, and of the average's; as it is where no objective
    wants one.
    """
    spec = stage.spec.objectives.get("masked_visual_tokens")
    if spec is None:
        return state
    found = centres(examples(spec, stage, batches), spec, stage.experiment.seed)
    say(f"{stage.name}: {spec.codebook_size} visual words of {spec.modality}")

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
    """Payloads float32 [N, P] of the first batches' particles, as the model reads them; every
    process reads the same.
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
    """Centres float32 [C, P] by k-means. Raises UserError for more clusters than there are
    different payloads.
    """
    different = len(np.unique(payloads, axis=0))
    if different < spec.codebook_size:
        raise UserError(
            f"objectives.masked_visual_tokens finds {spec.codebook_size} clusters among "
            f"{different} different "
            "particles: set its codes "
            "to fewer, or its examples to more."
        )
    fit = MiniBatchKMeans(spec.codebook_size, random_state=seed % 2**32, n_init=1).fit(payloads)
    return fit.cluster_centers_.astype(np.float32)
