# SPDX-License-Identifier: Apache-2.0
"""The modalities of a clip and their order.

Tokens stand in a row in this order, and random numbers are drawn for one modality after the other
in it. A new modality goes to the end: any other place would change what earlier runs compute.
"""

from collections.abc import Iterable

VISION, AUDIO, TEXT, TIMESERIES = "vision", "audio", "text", "timeseries"
# features of frozen networks, computed before (job extract_features)
FEATURES = ("video_features", "audio_features", "text_features")
MODALITIES = (AUDIO, FEATURES[0], FEATURES[1], TIMESERIES, TEXT, FEATURES[2], VISION)


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Modalities in their order; those that are not known come last, by name."""
    known = {name: i for i, name in enumerate(MODALITIES)}
    return tuple(sorted(names, key=lambda name: (known.get(name, len(known)), name)))
