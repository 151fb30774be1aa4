# SPDX-License-Identifier: Apache-2.0
"""Few-label methods on features of a frozen encoder: class prototypes and active-learning
selection.

Legend: N clips, D width, C classes.
"""

from collections.abc import Callable

import numpy as np

_SHARPNESS = 20.0  # scales cosines before the softmax, to make them comparable to probabilities


def centres(features: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """Prototypes [C, D]: the mean of each class's unit features, zeros for a class without clips
    (arXiv:1703.05175).
    """
    unit = _unit(features)
    return np.stack(
        [
            unit[label == c].mean(axis=0) if (label == c).any() else np.zeros(unit.shape[1])
            for c in range(classes)
        ]
    )


def nearest(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Softmax of the cosines to the prototypes, [N, C]; a class without a prototype gets 0."""
    cosine = np.where((centres != 0).any(axis=1), _unit(features) @ _unit(centres).T, -np.inf)
    weight = np.exp(_SHARPNESS * (cosine - cosine.max(axis=1, keepdims=True)))
    return weight / weight.sum(axis=1, keepdims=True)


def entropy(
    probabilities: np.ndarray, features: np.ndarray, open_to: np.ndarray, number: int, seed: int
) -> np.ndarray:
    """Indices of the `number` clips of `open_to` with the highest predictive entropy, highest
    first.
    """
    del features, seed
    unsure = -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=1)
    return _first(-unsure, open_to, number)


def margin(
    probabilities: np.ndarray, features: np.ndarray, open_to: np.ndarray, number: int, seed: int
) -> np.ndarray:
    """Indices of the clips with the smallest margin between the two most likely classes."""
    del features, seed
    best = np.sort(probabilities, axis=1)
    return _first(best[:, -1] - (best[:, -2] if best.shape[1] > 1 else 0.0), open_to, number)


def coreset(
    probabilities: np.ndarray, features: np.ndarray, open_to: np.ndarray, number: int, seed: int
) -> np.ndarray:
    """Indices of the clips farthest from all known and chosen ones (greedy k-center,
    arXiv:1708.00489).
    """
    del probabilities, seed
    unit, chosen = _unit(features), []
    known = unit[~open_to] if (~open_to).any() else unit.mean(axis=0, keepdims=True)
    near = np.min([((unit - each) ** 2).sum(axis=1) for each in known], axis=0)
    for _ in range(min(number, int(open_to.sum()))):
        free = open_to & ~np.isin(np.arange(len(unit)), chosen)
        chosen.append(int(np.where(free, near, -1.0).argmax()))
        near = np.minimum(near, ((unit - unit[chosen[-1]]) ** 2).sum(axis=1))
    return np.array(chosen, int)


def random(
    probabilities: np.ndarray, features: np.ndarray, open_to: np.ndarray, number: int, seed: int
) -> np.ndarray:
    """Random clips: the baseline."""
    del probabilities, features
    return np.random.default_rng(seed % 2**32).permutation(np.flatnonzero(open_to))[:number]


SELECT: dict[str, Callable[..., np.ndarray]] = {
    "entropy": entropy,
    "margin": margin,
    "coreset": coreset,
    "random": random,
}


def _first(value: np.ndarray, open_to: np.ndarray, number: int) -> np.ndarray:
    order = np.argsort(np.where(open_to, value, np.inf), kind="stable")
    return order[: min(number, int(open_to.sum()))]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
