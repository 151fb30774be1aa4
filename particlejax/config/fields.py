# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses that are filled from settings: what a field may hold stands beside its
default.

`make` turns nested mappings into them in one hop; an unknown key is an error that names the nearest
known one.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from particlejax.core.typing import UserError


def one_of(default: str, *others: str) -> Any:
    """A field that may only be one of these names; `make` refuses others."""
    return dataclasses.field(default=default, metadata={"names": (default, *others)})


def between(default: Any, least: float, most: float = math.inf) -> Any:
    """A field whose number, or each of whose numbers, lies between these two; `make` refuses
    others.
    """
    return dataclasses.field(default=default, metadata={"least": least, "most": most})


def at_least(default: Any, least: float) -> Any:
    """A field whose number, or each of whose numbers, is no smaller than this."""
    return between(default, least)


def interval(default: tuple, least: float, most: float = math.inf) -> Any:
    """A field of two numbers between these limits, the second no smaller than the first."""
    return dataclasses.field(
        default=default, metadata={"least": least, "most": most, "rising": True}
    )


def named(table: Mapping[str, type]) -> Any:
    """A field that maps names of the table to settings of their dataclasses."""
    return dataclasses.field(default_factory=dict, metadata={"table": table})


def section(spec: type, **values: Any) -> dict[str, Any]:
    """A config section: every key of `spec` with its default, `values` put in; so every key can be
    overridden.
    """
    return as_dict(make(spec, values, spec.__name__))


def arguments(text: str, *known: str) -> dict[str, bool]:
    """The words after an experiment file's colon, as in ':tiny,scratch': which of the known ones
    were given.
    """
    given = [word for word in text.split(",") if word]
    for word in given:
        if word not in known:
            raise UserError(
                f"the experiment file has no argument {word!r}: it knows {', '.join(known)}."
            )
    return {word: word in given for word in known}


def as_dict(spec: Any) -> dict[str, Any]:
    """A spec as nested dicts, for a ConfigDict or for JSON."""
    return dataclasses.asdict(spec)


def make(spec: type, values: Mapping[str, Any], where: str) -> Any:
    """`spec(**values)`, nested sections included. Raises UserError for a key that the spec does not
    have.
    """
    fields = {field.name: field for field in dataclasses.fields(spec)}
    for key in values:
        if key not in fields:
            raise UserError(unknown_key(key, where, fields))
        known = fields[key].metadata.get("names")
        if known and values[key] not in known:
            raise UserError(f"{where}.{key} is {values[key]!r}: choose one of {', '.join(known)}.")
        _check_shape(fields[key], values[key], f"{where}.{key}")
        _check_range(fields[key].metadata, values[key], f"{where}.{key}")
    return spec(
        **{key: _value(fields[key], value, f"{where}.{key}") for key, value in values.items()}
    )


def replaced(spec: Any, changes: Mapping[str, Any], name: str) -> Any:
    """`spec` with what a stage's section `name` changes; a section within it keeps what it had of
    the other keys.
    """
    changed = make(type(spec), changes, f"config.stages.*.{name}")
    inner = {key: value for key, value in changes.items() if isinstance(value, Mapping)}
    deeper = {
        key: replaced(getattr(spec, key), value, f"{name}.{key}") for key, value in inner.items()
    }
    return dataclasses.replace(spec, **{key: getattr(changed, key) for key in changes} | deeper)


def _check_shape(field: dataclasses.Field, value: Any, where: str) -> None:
    """A tuple is written as one, and of a fixed length where its type says so."""
    if get_origin(field.type) is not tuple:
        return
    wanted = len(get_args(field.type))
    if not isinstance(value, list | tuple):
        raise UserError(
            f"{where} is {value!r}: write it in brackets, with commas, such as {(value,)!r}."
        )
    if get_args(field.type)[-1] is not ... and len(value) != wanted:
        raise UserError(
            f"{where} is {tuple(value)!r}: write {wanted} values, such as {field.default!r}."
        )


def _check_range(limits: Mapping[str, Any], value: Any, where: str) -> None:
    """Numbers lie between their limits, NaN nowhere."""
    if "least" not in limits:
        return
    each = list(value) if isinstance(value, list | tuple) else [value]
    least, most = limits["least"], limits["most"]
    if not all(isinstance(number, int | float) and least <= number <= most for number in each):
        wanted = f"of {least:g} or more" if most == math.inf else f"between {least:g} and {most:g}"
        raise UserError(
            f"{where} is {value!r}: use {'numbers' if len(each) > 1 else 'a number'} {wanted}."
        )
    if limits.get("rising") and each[0] > each[1]:
        raise UserError(f"{where} is {tuple(value)!r}: write the smaller one first.")


def unknown_key(key: str, where: str, known: Any) -> str:
    """The sentence for a misspelt key."""
    near = difflib.get_close_matches(key, list(known), 1, 0.5)
    remedy = f"did you mean {where}.{near[0]}?" if near else f"it knows {', '.join(known)}."
    return f"{where} has no key {key!r}: {remedy}"


def _value(field: dataclasses.Field, value: Any, where: str) -> Any:
    """The value with every mapping in it turned into the dataclass that the field's type names."""
    inner = next(
        (each for each in (field.type, *get_args(field.type)) if dataclasses.is_dataclass(each)),
        None,
    )
    table = field.metadata.get("table")
    if table is not None:
        return {
            name: _filled(_of_table(table, name, where), each, f"{where}.{name}")
            for name, each in value.items()
        }
    if inner is None:
        return _tuples(value)
    if inner is field.type:
        return _filled(inner, value, where)
    if isinstance(value, Mapping):
        return {name: _filled(inner, each, f"{where}.{name}") for name, each in value.items()}
    return tuple(_filled(inner, each, f"{where}[{i}]") for i, each in enumerate(value))


def _filled(spec: type, value: Any, where: str) -> Any:
    return make(spec, value, where) if isinstance(value, Mapping) else value


def _of_table(table: Mapping[str, type], name: str, where: str) -> type:
    if name not in table:
        raise UserError(unknown_key(name, where, table))
    return table[name]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
