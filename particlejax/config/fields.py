# SPDX-License-Identifier: Apache-2.0
"""Settings as frozen dataclasses whose fields declare their valid values, checked on construction.

Errors of specs made in Python name the class (`OptimSpec.b1 is 2`); errors of `make` name the
config key (`config.stages.finetune.optim.b1 is 2`).
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin

from ml_collections import ConfigDict

from particlejax.config import plugins, renames
from particlejax.config.synonyms import last_part, synonyms
from particlejax.core.errors import UserError
from particlejax.core.suggest import did_you_mean


class Spec:
    """Base class of all settings; checks its values on construction.

    Lists become tuples, and whole floats such as 1e3 become int in int fields. Raises UserError for
    a value of the wrong type, out of range or not among the names. Subclasses check combinations of
    fields in `check`, with `Class.field` in their errors.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            key_path = f"{type(self).__name__}.{field.name}"
            value = getattr(self, field.name)
            if answer := renames.answer_value(type(self), field, value):
                raise UserError(answer)
            value = _converted(field, value, key_path)
            object.__setattr__(self, field.name, value)
            _check_range(field.metadata, value, key_path)
        self.check()

    def check(self) -> None:
        """Raises UserError for contradictory fields."""


def one_of(default: str, *others: str) -> Any:
    """A field that holds one of these names."""
    return dataclasses.field(default=default, metadata={"names": (default, *others)})


def named_in(default: str, table: Collection[str]) -> Any:
    """A field that holds a name of a table that plugins may extend."""
    return dataclasses.field(default=default, metadata={"names": table})


def some_of(default: tuple[str, ...], known: Collection[str], least: int = 1) -> Any:
    """A field of at least `least` distinct names out of the known ones."""
    return dataclasses.field(default=default, metadata={"names": known, "items": least})


def between(default: Any, least: float, most: float = math.inf, *, open_at: str = "") -> Any:
    """A field whose number, or whose every number, lies between two limits.

    open_at: 'least', 'most' or 'least most': the limits that are excluded.
    """
    return dataclasses.field(
        default=default, metadata={"least": least, "most": most, "open_at": open_at}
    )


def at_least(default: Any, least: float) -> Any:
    """A field whose number, or whose every number, is at least `least`."""
    return between(default, least)


def above(default: Any, least: float) -> Any:
    """A field whose number, or whose every number, is above `least`."""
    return between(default, least, open_at="least")


def number(default: Any) -> Any:
    """A field of any finite number."""
    return between(default, -math.inf, open_at="least most")


def interval(default: tuple, least: float, most: float = math.inf) -> Any:
    """A field of two ascending numbers between these limits."""
    return dataclasses.field(
        default=default, metadata={"least": least, "most": most, "rising": True}
    )


def named(table: Mapping[str, type]) -> Any:
    """A field that maps names of the table to instances of their dataclasses."""
    return dataclasses.field(default_factory=dict, metadata={"table": table})


def section(spec: type, **values: Any) -> dict[str, Any]:
    """Returns a config section: all keys of `spec` with their defaults, updated by `values`."""
    config = as_dict(make(spec, values, spec.__name__))
    for field in dataclasses.fields(spec):
        given, kept = values.get(field.name), config[field.name]
        if isinstance(given, Mapping) and isinstance(kept, dict):  # stages that do not run stay
            every = _convert_nested(field, given, f"{spec.__name__}.{field.name}")
            if isinstance(every, Mapping):
                missing = every.keys() - kept.keys()
                kept |= {name: as_dict(every[name]) for name in every if name in missing}
            if any("." in str(name) for name in kept):
                # a ConfigDict around it takes names with dots, such as 'lr-0.1', only this way
                config[field.name] = ConfigDict(kept, allow_dotted_keys=True)
    return config


def arguments(text: str, *known: str) -> dict[str, bool]:
    """Parses the words after an experiment file's colon, as in ':tiny,scratch'. Returns {known
    word: given}. Raises UserError for an unknown word.
    """
    given = [argument for argument in text.split(",") if argument]
    for argument in given:
        if argument not in known:
            raise UserError(
                f"the experiment file has no argument {argument!r}: {did_you_mean(argument, known)}"
            )
    return {argument: argument in given for argument in known}


def as_dict(spec: Any) -> dict[str, Any]:
    """Converts a spec to nested dicts, for a ConfigDict or JSON."""
    return dataclasses.asdict(spec)


def make(spec: type, values: Mapping[str, Any], key_path: str) -> Any:
    """Builds `spec(**values)`, including nested sections. Raises UserError for an unknown key or an
    invalid value, with its path below `key_path`.
    """
    fields = {field.name: field for field in dataclasses.fields(spec)}
    for key in values:
        if key not in fields:
            raise UserError(
                renames.answer_key(spec, key, key_path) or unknown_key(key, key_path, fields)
            )
    inner = {
        key: _convert_nested(fields[key], value, f"{key_path}.{key}")
        for key, value in values.items()
    }
    try:
        return spec(**inner)
    except UserError as error:
        raise UserError(str(error).replace(f"{spec.__name__}.", f"{key_path}.")) from None


def replaced(spec: Any, changes: Mapping[str, Any], key_path: str) -> Any:
    """Returns `spec` with some keys changed; nested sections keep their other keys."""
    return make(type(spec), _merged(as_dict(spec), changes), key_path)


def _merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    inner = {
        key: _merged(old[key], value)
        for key, value in changes.items()
        if isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
    }
    return {**old, **changes, **inner}


def unknown_key(key: str, key_path: str, known: Any) -> str:
    """Returns the error for an unknown key, with the closest match or known synonym."""
    for name in map(last_part, synonyms(key)):
        if name in known:
            return f"{key_path} has no key {key!r}: did you mean {key_path}.{name}?"
    return f"{key_path} has no key {key!r}: {did_you_mean(key, known, f'{key_path}.')}"


# -- conversion to field types


def _converted(field: dataclasses.Field, value: Any, key_path: str) -> Any:
    """Converts a value to its field's type. Raises UserError if it does not fit."""
    if table := field.metadata.get("table"):  # sorted by the table's order
        return {name: value[name] for name in table if name in value} | dict(value)
    if field.type is tuple or get_origin(field.type) is tuple:
        return _tuple(field, value, key_path)
    names = field.metadata.get("names")
    if names and not _known(value, names):
        raise UserError(f"{key_path} is {value!r}: choose one of {', '.join(names)}.")
    if field.type is int and isinstance(value, float) and value.is_integer():
        return int(value)
    allowed = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.get(field.type)
    if allowed and not (isinstance(value, allowed) and (bool in allowed or not _is_bool(value))):
        kind = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}
        raise UserError(f"{key_path} is {value!r}: write {kind[field.type]}.")
    return value


def _known(name: Any, names: Collection[str]) -> bool:
    """Whether a name is known, including names of the parent process's plugins."""
    if name not in names and isinstance(names, dict):  # a table that plugins extend
        plugins.load_inherited()
    return name in names


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _tuple(field: dataclasses.Field, value: Any, key_path: str) -> tuple:
    """Converts a list or tuple to the field's tuple type."""
    inner = get_args(field.type)
    if not isinstance(value, list | tuple):
        raise UserError(f"{key_path} is {value!r}: write a tuple, such as {(value,)!r}.")
    if inner and inner[-1] is not ... and len(value) != len(inner):
        raise UserError(
            f"{key_path} is {tuple(value)!r}: write {len(inner)} values, such as {field.default!r}."
        )
    if inner and inner[0] is int:
        value = [
            int(item) if isinstance(item, float) and item.is_integer() else item for item in value
        ]
    names = field.metadata.get("names")
    for name in value if names is not None else ():
        if not _known(name, names):
            raise UserError(f"{key_path} has {name!r}: choose from {', '.join(names)}.")
    if len(value) < field.metadata.get("items", 0):
        raise UserError(f"{key_path} is empty: name at least one of {', '.join(names)}.")
    if names and len(set(value)) < len(value):
        raise UserError(f"{key_path} is {tuple(value)!r}: remove the duplicates.")
    return _tuples(value)


def _check_range(limits: Mapping[str, Any], value: Any, key_path: str) -> None:
    """Raises UserError for numbers out of range; NaN is always out of range."""
    if "least" not in limits:
        return
    numbers = list(value) if isinstance(value, tuple) else [value]
    if not all(_in_range(number, limits) for number in numbers):
        noun = "numbers" if len(numbers) > 1 else "a number"
        raise UserError(f"{key_path} is {value!r}: use {noun} {range_text(limits)}.")
    if limits.get("rising") and numbers[0] > numbers[1]:
        raise UserError(f"{key_path} is {value!r}: write the smaller number first.")


def _in_range(value: Any, limits: Mapping[str, Any]) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    open_bounds = limits.get("open_at", "")
    above_least = value > limits["least"] if "least" in open_bounds else value >= limits["least"]
    below_most = value < limits["most"] if "most" in open_bounds else value <= limits["most"]
    return above_least and below_most


def range_text(limits: Mapping[str, Any]) -> str:
    """Describes a field's limits, such as 'of 1 or more'; '' without limits."""
    if "least" not in limits:
        return ""
    least, most, open_bounds = limits["least"], limits["most"], limits.get("open_at", "")
    if least == -math.inf:
        return "that is finite"
    if most == math.inf:
        return f"above {least:g}" if "least" in open_bounds else f"of {least:g} or more"
    if not open_bounds:
        return f"between {least:g} and {most:g}"
    lower = f"above {least:g}" if "least" in open_bounds else f"of {least:g} or more"
    return f"{lower} and {'below' if 'most' in open_bounds else 'at most'} {most:g}"


# -- nested sections


def _convert_nested(field: dataclasses.Field, value: Any, key_path: str) -> Any:
    """Converts all mappings in a value to the dataclasses of the field's type."""
    table = field.metadata.get("table")
    if table is not None:
        return {
            name: _make_section(_lookup_spec(table, name, key_path), settings, f"{key_path}.{name}")
            for name, settings in value.items()
        }
    types = (field.type, *get_args(field.type))
    inner = next((kind for kind in types if dataclasses.is_dataclass(kind)), None)
    if inner is None:
        return value
    if inner is field.type:
        return _make_section(inner, value, key_path)
    if isinstance(value, Mapping):
        return {
            name: _make_section(inner, item, f"{key_path}.{name}") for name, item in value.items()
        }
    return tuple(_make_section(inner, item, f"{key_path}[{i}]") for i, item in enumerate(value))


def _make_section(spec: type, value: Any, key_path: str) -> Any:
    return make(spec, value, key_path) if isinstance(value, Mapping) else value


def _lookup_spec(table: Mapping[str, type], name: str, key_path: str) -> type:
    if name not in table:
        new = renames.OBJECTIVES.get(name, "")
        raise UserError(
            f"{key_path}.{name} is now {key_path}.{new}."
            if new in table
            else unknown_key(name, key_path, table)
        )
    return table[name]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
