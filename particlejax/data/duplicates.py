# SPDX-License-Identifier: Apache-2.0
"""Finds clips that are the same, overlap, look alike, or belong together although they are in
several splits.

Exact matches come first: equal bytes, equal decoded frames, overlapping segments of one film. Then
clips are compared by likeness (fingerprint.py). The cost grows with N log N: of many clips that
are all the same, each is paired with a few.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple, TypeVar

import numpy as np

from particlejax.data import fingerprint
from particlejax.data.inspect import ClipInfo

# kinds of pairs, the surest first
SAME_FILE, SAME_FRAMES, OVERLAP, ALIKE = "same file", "same frames", "overlap", "look alike"
SAME_GROUP, SAME_FILM = "same group", "same film"
KINDS = (SAME_FILE, SAME_FRAMES, OVERLAP, ALIKE, SAME_GROUP, SAME_FILM)
CONTENT_KINDS = frozenset((SAME_FILE, SAME_FRAMES, OVERLAP, ALIKE))

MAX_LISTED = 8  # equal clips that are all paired with each other; of more, each with this many
_MIN_OVERLAP_FRAMES = 1.5  # less is a rounded border between two segments
_MIN_LABEL_OVERLAP = 0.5  # part of the shorter segment from which on both should have one label
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SplitClip:
    """A clip with its split, the name of its label ('': unlabelled), and the part of a mixture that
    it is from.
    """

    split: str
    info: ClipInfo
    label: str = ""
    part: int = 0

    def __str__(self) -> str:
        return f"{self.split}: {self.info.name}"

    @property
    def end(self) -> float:
        return self.info.start + self.info.seconds


class Pair(NamedTuple):
    """Two clips that belong together. seconds: of an overlap."""

    kind: str
    one: SplitClip
    other: SplitClip
    detail: str = ""
    seconds: float = 0.0

    @property
    def is_across(self) -> bool:
        """Whether the clips are in different splits."""
        return self.one.split != self.other.split

    @property
    def is_contradictory(self) -> bool:
        """Whether equal content has different labels."""
        if self.kind not in CONTENT_KINDS or not labels_contradict(
            self.one.label, self.other.label
        ):
            return False
        shorter = min(self.one.info.seconds, self.other.info.seconds)
        return not self.seconds or self.seconds >= _MIN_LABEL_OVERLAP * shorter


def labels_contradict(one: str, other: str) -> bool:
    """Whether two labels differ: names, sets of names ('a|b'), or numbers; '' contradicts none."""
    if not one or not other or one == other:
        return False
    try:
        return float(one) != float(other)
    except ValueError:
        return _names(one) != _names(other)


def _names(label: str) -> set[str]:
    return {name.strip() for name in label.split("|")}


def find_pairs(clips: Sequence[SplitClip]) -> list[Pair]:
    """Returns the pairs, worst first: across splits before within one, contradictory labels first,
    and the surest kind first. Each pair of clips is listed once, by its surest kind.
    """
    found: dict[tuple[int, int], Pair] = {}
    clip_index = {clip: i for i, clip in enumerate(clips)}
    copies = _group_by(clips, lambda clip: clip.info.digest)
    originals = [members[0] for members in copies.values()]
    for pair in (
        *_equal_pairs(copies.values()),
        *_overlaps(clips),
        *_like_clips(originals, copies),
    ):
        one, other = clip_index[pair.one], clip_index[pair.other]
        if one > other:
            one, other, pair = other, one, pair._replace(one=pair.other, other=pair.one)
        found.setdefault((one, other), pair)
    pairs = [found[key] for key in sorted(found)]
    pairs += [*_shared_groups(clips), *_shared_films(clips, pairs)]
    return sorted(
        pairs,
        key=lambda pair: (not pair.is_across, not pair.is_contradictory, KINDS.index(pair.kind)),
    )


def _group_by(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _sample(clips: Sequence[SplitClip]) -> list[SplitClip]:
    """Returns all clips, or of many the first of each split and label, at most MAX_LISTED."""
    if len(clips) <= MAX_LISTED:
        return list(clips)
    first_of = {}
    for clip in clips:
        first_of.setdefault((clip.split, clip.label), clip)
    # a clip of each split before other labels
    splits = {clip.split: clip for clip in reversed(first_of.values())}
    return list(dict.fromkeys((*splits.values(), *first_of.values())))[:MAX_LISTED]


# -- equal content


def _equal_pairs(copies: Iterable[Sequence[SplitClip]]) -> Iterator[Pair]:
    for clips in copies:
        few = len(clips) <= MAX_LISTED
        sample = _sample(clips)
        pairs = combinations(clips, 2) if few else ((a, b) for b in clips for a in sample)
        for one, other in pairs:
            if one is not other:
                is_same_file = (one.info.file.digest, one.info.start, one.end) == (
                    other.info.file.digest,
                    other.info.start,
                    other.end,
                )
                yield Pair(SAME_FILE if is_same_file else SAME_FRAMES, one, other)


def _like_clips(
    originals: Sequence[SplitClip], copies: Mapping[Hashable, Sequence[SplitClip]]
) -> Iterator[Pair]:
    pairs = fingerprint.like_pairs(
        [clip.info.fingerprint for clip in originals],
        np.array([clip.info.seconds for clip in originals]),
    )
    num_partners = np.zeros((len(originals), 2), int)
    across = np.array([originals[i].split != originals[j].split for i, j in pairs], int)
    for (i, j), is_across in zip(pairs, across, strict=True):
        # many clips of one still camera are all alike: a few pairs of each are enough
        if max(num_partners[i, is_across], num_partners[j, is_across]) >= MAX_LISTED:
            continue
        num_partners[[i, j], is_across] += 1
        one, other = (_sample(copies[originals[k].info.digest]) for k in (i, j))
        yield from (Pair(ALIKE, a, b) for a in one for b in other)


# -- films: files with segments


def _overlaps(clips: Sequence[SplitClip]) -> Iterator[Pair]:
    """Yields overlapping segments of equal files, then those of files that look alike."""
    by_file = _group_by(clips, lambda clip: clip.info.file.digest)
    for members in by_file.values():
        for one, other, seconds in _sweep(members):
            yield Pair(OVERLAP, one, other, f"{seconds:.2f} s", seconds)
    # still films look alike, whatever day they show
    films = [
        members
        for members in by_file.values()
        if any(clip.info.seconds < clip.info.file.seconds for clip in members)
        and members[0].info.file.fingerprint.moves
    ]
    files = [members[0].info.file for members in films]
    for i, j in fingerprint.like_pairs(
        [file.fingerprint for file in files], np.array([file.seconds for file in files])
    ):
        for one, other, seconds in _sweep([*films[i], *films[j]]):
            if one.info.file.digest != other.info.file.digest:
                yield Pair(ALIKE, one, other, f"{seconds:.2f} s of like films overlap", seconds)


def _sweep(clips: Sequence[SplitClip]) -> Iterator[tuple[SplitClip, SplitClip, float]]:
    """Yields overlapping segments of a film and the seconds that they share; of many segments that
    all overlap, each with the longest of each split.
    """
    running: dict[str, list[SplitClip]] = defaultdict(list)  # began before, the last end first
    for clip in sorted(clips, key=lambda clip: clip.info.start):
        for earlier in running.values():
            earlier[:] = [other for other in earlier if other.end > clip.info.start]
            for other in earlier:
                seconds = min(other.end, clip.end) - clip.info.start
                if seconds * clip.info.fps >= _MIN_OVERLAP_FRAMES:
                    yield other, clip, seconds
        same_split = running[clip.split]
        same_split.append(clip)
        same_split.sort(key=lambda other: -other.end)
        del same_split[MAX_LISTED:]


def _shared_films(clips: Sequence[SplitClip], pairs: Sequence[Pair]) -> Iterator[Pair]:
    """Yields a pair of each film whose segments are in several splits without overlapping."""
    leaked = {
        (pair.one.info.file.digest, *sorted((pair.one.split, pair.other.split)))
        for pair in pairs
        if pair.one.info.file.digest == pair.other.info.file.digest
    }
    for digest, members in _group_by(clips, lambda clip: clip.info.file.digest).items():
        for one, other, detail in _first_of_splits(members):
            if (digest, *sorted((one.split, other.split))) not in leaked:
                yield Pair(SAME_FILM, one, other, detail)


def _shared_groups(clips: Sequence[SplitClip]) -> Iterator[Pair]:
    """Yields a pair of each group that is in several splits."""
    grouped = (clip for clip in clips if clip.info.group)
    for (_, name), members in _group_by(grouped, lambda c: (c.part, c.info.group)).items():
        for one, other, detail in _first_of_splits(members):
            yield Pair(SAME_GROUP, one, other, f"{name}: {detail}")


def _first_of_splits(clips: Sequence[SplitClip]) -> Iterator[tuple[SplitClip, SplitClip, str]]:
    """Yields the first clip of each two splits, and how many clips each has."""
    by_split = _group_by(clips, lambda clip: clip.split)
    for (one, members), (other, others) in combinations(by_split.items(), 2):
        detail = f"clips: {len(members)} in {one}, {len(others)} in {other}"
        yield members[0], others[0], detail
