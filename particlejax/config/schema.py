# SPDX-License-Identifier: Apache-2.0
"""The valid keys of a config: the specs as a tree, traversed by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args, get_origin

from particlejax.config.fields import Spec


class Place(NamedTuple):
    """A node of the config tree.

    field: its spec field; None for the root and for table entries. spec: the dataclass of a
    section, else None. table: for a mapping with fixed names, its dataclasses by name; else None.
    item_spec: the dataclass of the items of a mapping with free names (stages) or of a tuple; else
    None. partial: whether the section only holds overrides of another one, so it has no defaults.
    """

    field: dataclasses.Field | None = None
    spec: type | None = None
    table: Mapping[str, type] | None = None
    item_spec: type | None = None
    partial: bool = False

    @property
    def is_leaf(self) -> bool:
        """Whether the node is a value, not a section or mapping."""
        return not (self.spec or self.table is not None or self.is_mapping)

    @property
    def is_mapping(self) -> bool:
        """Whether the node accepts keys of any name."""
        return self.field is not None and get_origin(self.field.type) is Mapping


def fields_of(spec: type) -> dict[str, dataclasses.Field]:
    """Returns the fields of a spec by name."""
    return {field.name: field for field in dataclasses.fields(spec)}


def child(place: Place, name: str, top: type) -> Place | None:
    """Returns the child `name` of a node in a config of spec `top`; None for an unknown key."""
    if place.spec:
        field = fields_of(place.spec).get(name)
        return field and _of_field(field, place, top)
    if place.table is not None:
        return Place(spec=place.table[name]) if name in place.table else None
    if place.item_spec and place.is_mapping:
        return Place(spec=place.item_spec)
    return None


def names(place: Place) -> tuple[str, ...]:
    """Returns the valid keys of a section or table; () for other nodes."""
    return tuple(fields_of(place.spec)) if place.spec else tuple(place.table or ())


def _of_field(field: dataclasses.Field, parent: Place, top: type) -> Place:
    if _is_spec(field.type):
        return Place(field, spec=field.type, partial=parent.partial)
    if (table := field.metadata.get("table")) is not None:
        return Place(field, table=table)
    inner_spec = next((kind for kind in get_args(field.type) if _is_spec(kind)), None)
    place = Place(field, item_spec=inner_spec)
    # a nested mapping with the name of a top-level section holds its overrides
    if place.is_mapping and not inner_spec and parent.spec is not top:
        top_field = fields_of(top).get(field.name)
        if top_field and _is_spec(top_field.type):
            return Place(field, spec=top_field.type, partial=True)
    return place


def _is_spec(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Spec)
