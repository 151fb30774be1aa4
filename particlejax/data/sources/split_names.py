# SPDX-License-Identifier: Apache-2.0
"""Names of splits: the common words for train, val and test, and expressions such as
'train[:90%]+val'.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from particlejax.core import text
from particlejax.core.typing import UserError

ALL = "all"  # every clip of every split
_WORDS = {
    "train": ("train", "training"),
    # in the order of preference where a data set has several
    "val": ("val", "validation", "valid", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_NAMES = {word: name for name, words in _WORDS.items() for word in words}
_SYNONYMS = frozenset({"val", "validation", "valid"})  # one split, also where a table has several
_OWN = frozenset({"dev", "eval", "evaluation"})  # splits of their own beside one called val


class UnknownSplit(UserError):
    """A split that a source does not have, or a malformed one."""


def is_split(word: str) -> bool:
    """Whether a word names a split, in any case: train, training, val, valid, validation, dev,
    eval, evaluation, test, testing.
    """
    return word.casefold() in _NAMES


def canonical(word: str) -> str:
    """Returns train, val or test for their words in any case; any other word as it is."""
    return _NAMES.get(word.casefold(), text.nfc(word))


def of_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the name of a data set's split for each of the words train, val, test and their
    synonyms, such as {'train': 'train', 'val': 'validation', 'valid': 'validation'}.
    """
    names, found = list(names), {}
    for split, words in _WORDS.items():
        own = sorted(
            (name for name in names if canonical(name) == split),
            key=lambda name: words.index(name.casefold()),
        )
        if own:
            found[split] = own[0]
            if own[0].casefold() in _SYNONYMS:
                found |= dict.fromkeys(_SYNONYMS, own[0])
    return found


def of_folders(folders: Iterable[str], where: str) -> dict[str, str]:
    """Returns the split of each folder. Raises UserError if two folders are one split."""
    splits: dict[str, str] = {}
    for folder in sorted(folders):
        name = canonical(folder)
        twin = next((other for other, split in splits.items() if split == name), None)
        if twin:
            raise UserError(
                f"{where} holds the folders {twin!r} and {folder!r}, which both mean split "
                f"{name!r}: merge them, or rename one of them."
            )
        splits[folder] = name
    return splits


def of_column(places: Mapping[str, str]) -> dict[str, str]:
    """Returns the split of each word in a table's column; `places` maps words to where they stand
    first.

    Cases of a word are one split, and so are val, valid and validation. 'dev' and 'eval' mean val
    unless the table has a split val too. Raises UserError for other words of one split.
    """
    splits: dict[str, str] = {}
    for name, words in _WORDS.items():
        used = [word for word in places if word.casefold() in words]
        kinds = {word.casefold() for word in used}
        own = kinds & _OWN if kinds & _SYNONYMS else set()
        merged = kinds - own
        if len(merged) > 1 and not merged <= _SYNONYMS:
            first, second = [word for word in used if word.casefold() in merged][:2]
            raise UserError(
                f"{places[second]}: split {second!r} and {first!r} ({places[first]}) both mean "
                f"{name!r}: write one of them throughout."
            )
        splits |= {word: word.casefold() if word.casefold() in own else name for word in used}
    return {word: splits.get(word, word) for word in places}


class Splits(NamedTuple):
    """The splits of a source's clips.

    of_clip: the split of each clip. order: of the clips, which parts such as 'train[:90%]' follow.
    words: the split of each word that stands in the source, such as {'validation': 'val'}. where:
    the source, for errors.
    """

    of_clip: Sequence[str]
    order: Sequence[int]
    words: Mapping[str, str]
    where: str

    def select(self, expression: str) -> list[int]:
        """Returns the sorted clips of an expression: NAME or NAME[from:to], joined by +. Raises
        UnknownSplit.
        """
        expression = text.nfc(expression)
        if expression in self.of_clip:  # also a name with '+' or a bracket
            return [i for i, split in enumerate(self.of_clip) if split == expression]
        selected: set[int] = set()
        for part in expression.split("+"):
            selected |= set(self._part(part.strip()))
        if not selected:
            raise UnknownSplit(
                f"split {expression!r} of {self.where} selects no clip: widen the range in "
                "brackets."
            )
        return sorted(selected)

    def _part(self, part: str) -> Sequence[int]:
        match = re.fullmatch(r"([^\[\]]+?)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?", part)
        if not match:
            raise UnknownSplit(
                f"split {part!r} of {self.where} is malformed: write a name, or a part like "
                "'train[:90%]' or 'train[10:20]'."
            )
        own = sorted(set(self.of_clip))
        name = find(match[1], own, self.words, self.where)
        clips = [i for i in self.order if name not in own or self.of_clip[i] == name]
        return clips[_bound(match[2], len(clips)) : _bound(match[3], len(clips))]


def find(name: str, splits: Collection[str], words: Mapping[str, str], where: str) -> str:
    """Returns the split of a source that a name means: one of `splits`, or 'all'.

    A word is known in any case if the source has it; val, valid and validation are one split.
    Raises UnknownSplit.
    """
    by_fold = {split.casefold(): split for split in splits}
    by_fold |= {word.casefold(): split for word, split in words.items()}
    name, folded = text.nfc(name), text.nfc(name).casefold()
    if name in splits or name == ALL:
        return name
    if folded in by_fold:
        return by_fold[folded]
    if folded in _SYNONYMS and "val" in splits:
        return "val"
    raise UnknownSplit(f"{where} has no split {name!r}: use one of {', '.join(splits)}.")


def _bound(bound: str | None, count: int) -> int | None:
    if bound is None:
        return None
    return round(count * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
