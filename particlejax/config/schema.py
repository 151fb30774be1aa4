# SPDX-License-Identifier: Apache-2.0
"""What may stand at each place of a config: the specs as a tree that is walked by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args, get_origin

from particlejax.config.fields import Spec


class Place(NamedTuple):
    """One place of a config.

    field: the spec field that it is, None for the top and for what stands in a table.
    spec: the dataclass of a section, else None.
    table: of a mapping, the names that it may have with their dataclasses; else None.
    each: of a mapping of free names (stages), the dataclass of every item; of a tuple of sections
    that of its items; else None.
    partial: a section that holds only what differs from another one, so it has no defaults.
    """

    field: dataclasses.Field | None = None
    spec: type | None = None
    table: Mapping[str, type] | None = None
    each: type | None = None
    partial: bool = False

    @property
    def is_leaf(self) -> bool:
        """Whether a value stands here and no section or mapping."""
        return not (self.spec or self.table is not None or self.is_mapping)

    @property
    def is_mapping(self) -> bool:
        """Whether keys of any name may stand here."""
        return self.field is not None and get_origin(self.field.type) is Mapping


def fields_of(spec: type) -> dict[str, dataclasses.Field]:
    """The fields of a spec by name."""
    return {field.name: field for field in dataclasses.fields(spec)}


def child(place: Place, name: str, top: type) -> Place | None:
    """What stands at `name` within a place of a config whose whole is `top`; None where a spec has
    no such key.
    """
    if place.spec:
        field = fields_of(place.spec).get(name)
        return field and _of_field(field, place, top)
    if place.table is not None:
        return Place(spec=place.table[name]) if name in place.table else None
    if place.each and place.is_mapping:
        return Place(spec=place.each)
    return None


def names(place: Place) -> tuple[str, ...]:
    """The keys that a section or a table may have; () for the others."""
    return tuple(fields_of(place.spec)) if place.spec else tuple(place.table or ())


def _of_field(field: dataclasses.Field, parent: Place, top: type) -> Place:
    if _is_spec(field.type):
        return Place(field, spec=field.type, partial=parent.partial)
    if (table := field.metadata.get("table")) is not None:
        return Place(field, table=table)
    each = next((kind for kind in get_args(field.type) if _is_spec(kind)), None)
    place = Place(field, each=each)
    # a mapping within a section that is called as a section of the whole holds what differs
    if place.is_mapping and not each and parent.spec is not top:
        whole = fields_of(top).get(field.name)
        if whole and _is_spec(whole.type):
            return Place(field, spec=whole.type, partial=True)
    return place


def _is_spec(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Spec)
