# SPDX-License-Identifier: Apache-2.0
"""Few-label methods on features of a frozen encoder: class prototypes and active-learning
selection.

Legend: N clips, D width, C classes.
"""

from collections.abc import Callable

import numpy as np

_LOGIT_SCALE = 20.0  # scales cosines before the softmax, to make them comparable to probabilities


def class_centers(features: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """Prototypes [C, D]: the mean of each class's unit features, zeros for a class without clips
    (arXiv:1703.05175).
    """
    normalized = _normalize(features)
    return np.stack(
        [
            normalized[label == class_index].mean(axis=0)
            if (label == class_index).any()
            else np.zeros(normalized.shape[1])
            for class_index in range(classes)
        ]
    )


def nearest_center_probs(features: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Softmax of the cosines to the prototypes, [N, C]; a class without a prototype gets 0."""
    cosine = np.where(
        (centers != 0).any(axis=1), _normalize(features) @ _normalize(centers).T, -np.inf
    )
    weight = np.exp(_LOGIT_SCALE * (cosine - cosine.max(axis=1, keepdims=True)))
    return weight / weight.sum(axis=1, keepdims=True)


def entropy(
    probabilities: np.ndarray,
    features: np.ndarray,
    candidates: np.ndarray,
    num_clips: int,
    seed: int,
) -> np.ndarray:
    """Indices of the `num_clips` clips of `candidates` with the highest predictive entropy, highest
    first.
    """
    del features, seed
    entropies = -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=1)
    return _lowest(-entropies, candidates, num_clips)


def margin(
    probabilities: np.ndarray,
    features: np.ndarray,
    candidates: np.ndarray,
    num_clips: int,
    seed: int,
) -> np.ndarray:
    """Indices of the clips with the smallest margin between the two most likely classes."""
    del features, seed
    best = np.sort(probabilities, axis=1)
    return _lowest(best[:, -1] - (best[:, -2] if best.shape[1] > 1 else 0.0), candidates, num_clips)


def coreset(
    probabilities: np.ndarray,
    features: np.ndarray,
    candidates: np.ndarray,
    num_clips: int,
    seed: int,
) -> np.ndarray:
    """Indices of the clips farthest from all known and chosen ones (greedy k-center,
    arXiv:1708.00489).
    """
    del probabilities, seed
    normalized, selected = _normalize(features), []
    covered = (
        normalized[~candidates] if (~candidates).any() else normalized.mean(axis=0, keepdims=True)
    )
    distance = np.min([((normalized - center) ** 2).sum(axis=1) for center in covered], axis=0)
    for _ in range(min(num_clips, int(candidates.sum()))):
        available = candidates & ~np.isin(np.arange(len(normalized)), selected)
        selected.append(int(np.where(available, distance, -1.0).argmax()))
        distance = np.minimum(distance, ((normalized - normalized[selected[-1]]) ** 2).sum(axis=1))
    return np.array(selected, int)


def random(
    probabilities: np.ndarray,
    features: np.ndarray,
    candidates: np.ndarray,
    num_clips: int,
    seed: int,
) -> np.ndarray:
    """Random clips: the baseline."""
    del probabilities, features
    return np.random.default_rng(seed % 2**32).permutation(np.flatnonzero(candidates))[:num_clips]


STRATEGIES: dict[str, Callable[..., np.ndarray]] = {
    "entropy": entropy,
    "margin": margin,
    "coreset": coreset,
    "random": random,
}


def _lowest(value: np.ndarray, candidates: np.ndarray, num_clips: int) -> np.ndarray:
    order = np.argsort(np.where(candidates, value, np.inf), kind="stable")
    return order[: min(num_clips, int(candidates.sum()))]


def _normalize(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
