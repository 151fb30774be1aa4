# SPDX-License-Identifier: Apache-2.0
"""The modalities of a clip, in their fixed order.

Tokens in a row and random number streams follow this order. Append new modalities; any other
position changes the results of earlier runs.
"""

from collections.abc import Iterable

VISION, AUDIO, TEXT, TIMESERIES = "vision", "audio", "text", "timeseries"
# precomputed features of frozen networks (job extract_features)
FEATURES = ("video_features", "audio_features", "text_features")
MODALITIES = (AUDIO, FEATURES[0], FEATURES[1], TIMESERIES, TEXT, FEATURES[2], VISION)


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts modalities by their fixed order; unknown ones come last, sorted by name."""
    known = {name: i for i, name in enumerate(MODALITIES)}
    return tuple(sorted(names, key=lambda name: (known.get(name, len(known)), name)))
