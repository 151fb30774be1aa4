# SPDX-License-Identifier: Apache-2.0
"""Splits made for a source that names none: a fifth of the clips of each class, whole groups."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from particlejax.core import csv_table

VAL_FRACTION = 0.2  # fraction of the clips of a class that becomes val
_SEPARATOR = "|"  # of the classes of a multi-label clip
_LEAST_GROUPS = 5  # numbers with fewer groups are values of a measurement, not classes


class Group(NamedTuple):
    """Clips that stay together: a name and how many clips have each class."""

    name: str
    classes: Counter[str]


def name_hash(text: str) -> float:
    """Returns a number in [0, 1) that is the same in every process and on every machine."""
    return (
        int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:6], "big")
        / 2**48
    )


def val_groups(groups: Sequence[str], labels: Sequence[str]) -> set[str]:
    """Returns the groups that become val, from the group and the label of each clip.

    Each class has a fifth of its clips in val, as nearly as whole groups allow, and at least one
    group on both sides if it has two. Classes are taken one after the other, rare ones first, and
    the groups of a class in the order of their hashes (Sechidis et al. 2011). So the result depends
    neither on the order of clips nor on a seed, and another clip moves few of the others.
    """
    collected = _collect(groups, labels)
    total = sum((group.classes for group in collected), Counter())
    by_class = {name: [g for g in collected if g.classes[name]] for name in total}
    val: set[str] = set()
    done: set[str] = set()
    for name in sorted(total, key=lambda name: (total[name], name)):
        count = sum(g.classes[name] for g in by_class[name] if g.name in val)
        free = [g for g in by_class[name] if g.name not in done]
        for group in free:
            size = group.classes[name]
            if count + size / 2 <= VAL_FRACTION * total[name]:
                val.add(group.name)
                count += size
        _keep_both_sides(by_class[name], free, name, val)
        done |= {group.name for group in free}
    return val


def _collect(groups: Sequence[str], labels: Sequence[str]) -> list[Group]:
    """Returns the groups with their classes, in descending order of their hashes."""
    found: dict[str, Counter[str]] = {}
    for group, label in zip(groups, labels, strict=True):
        found.setdefault(group, Counter()).update(_classes(label))
    holders = Counter(name for classes in found.values() for name in classes)
    pooled = {name for name, count in holders.items() if count < _least(name)}
    return [
        Group(name, _pool(found[name], pooled))
        for name in sorted(found, key=lambda name: (name_hash(name), name), reverse=True)
    ]


def _classes(label: str) -> Iterable[str]:
    return {part.strip() for part in label.split(_SEPARATOR)}


def _least(name: str) -> int:
    """Returns how many groups a class needs to be divided by itself, not with the rest."""
    return 2 if csv_table.number(name) is None else _LEAST_GROUPS


def _pool(classes: Counter[str], pooled: set[str]) -> Counter[str]:
    """Counts the pooled classes as one, ''."""
    kept = Counter({name: count for name, count in classes.items() if name not in pooled})
    rest = sum(count for name, count in classes.items() if name in pooled)
    return kept + Counter({"": rest})


def _keep_both_sides(holders: list[Group], free: list[Group], name: str, val: set[str]) -> None:
    """Moves the smallest free group if val or train would have no clip of a class."""
    inside = [group.name in val for group in holders]
    if len(holders) > 1 and free and len(set(inside)) == 1:
        smallest = min(free, key=lambda group: group.classes[name])  # the first of equal ones
        val ^= {smallest.name}
