# SPDX-License-Identifier: Apache-2.0
"""Settings as frozen dataclasses whose fields declare their valid values, checked on construction.

Errors of specs made in Python name the class (`OptimSpec.b1 is 2`); errors of `make` name the
config key (`config.stages.finetune.optim.b1 is 2`).
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin

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
            where = f"{type(self).__name__}.{field.name}"
            value = getattr(self, field.name)
            if answer := renames.answer_value(type(self), field, value):
                raise UserError(answer)
            value = _converted(field, value, where)
            object.__setattr__(self, field.name, value)
            _check_range(field.metadata, value, where)
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
            every = _filled(field, given, f"{spec.__name__}.{field.name}")
            if isinstance(every, Mapping):
                missing = every.keys() - kept.keys()
                kept |= {name: as_dict(every[name]) for name in every if name in missing}
    return config


def arguments(text: str, *known: str) -> dict[str, bool]:
    """Parses the words after an experiment file's colon, as in ':tiny,scratch'. Returns {known
    word: given}. Raises UserError for an unknown word.
    """
    given = [word for word in text.split(",") if word]
    for word in given:
        if word not in known:
            raise UserError(
                f"the experiment file has no argument {word!r}: {did_you_mean(word, known)}"
            )
    return {word: word in given for word in known}


def as_dict(spec: Any) -> dict[str, Any]:
    """Converts a spec to nested dicts, for a ConfigDict or JSON."""
    return dataclasses.asdict(spec)


def make(spec: type, values: Mapping[str, Any], where: str) -> Any:
    """Builds `spec(**values)`, including nested sections. Raises UserError for an unknown key or an
    invalid value, with its path below `where`.
    """
    fields = {field.name: field for field in dataclasses.fields(spec)}
    for key in values:
        if key not in fields:
            raise UserError(renames.answer_key(spec, key, where) or unknown_key(key, where, fields))
    inner = {key: _filled(fields[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return spec(**inner)
    except UserError as error:
        raise UserError(str(error).replace(f"{spec.__name__}.", f"{where}.")) from None


def replaced(spec: Any, changes: Mapping[str, Any], where: str) -> Any:
    """Returns `spec` with some keys changed; nested sections keep their other keys."""
    return make(type(spec), _merged(as_dict(spec), changes), where)


def _merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    inner = {
        key: _merged(old[key], value)
        for key, value in changes.items()
        if isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
    }
    return {**old, **changes, **inner}


def unknown_key(key: str, where: str, known: Any) -> str:
    """Returns the error for an unknown key, with the closest match or known synonym."""
    for name in map(last_part, synonyms(key)):
        if name in known:
            return f"{where} has no key {key!r}: did you mean {where}.{name}?"
    return f"{where} has no key {key!r}: {did_you_mean(key, known, f'{where}.')}"


# -- conversion to field types


def _converted(field: dataclasses.Field, value: Any, where: str) -> Any:
    """Converts a value to its field's type. Raises UserError if it does not fit."""
    if table := field.metadata.get("table"):  # sorted by the table's order
        return {name: value[name] for name in table if name in value} | dict(value)
    if field.type is tuple or get_origin(field.type) is tuple:
        return _tuple(field, value, where)
    names = field.metadata.get("names")
    if names and not _known(value, names):
        raise UserError(f"{where} is {value!r}: choose one of {', '.join(names)}.")
    if field.type is int and isinstance(value, float) and value.is_integer():
        return int(value)
    wanted = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.get(field.type)
    if wanted and not (isinstance(value, wanted) and (bool in wanted or not _is_bool(value))):
        kind = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}
        raise UserError(f"{where} is {value!r}: write {kind[field.type]}.")
    return value


def _known(name: Any, names: Collection[str]) -> bool:
    """Whether a name is known, including names of the parent process's plugins."""
    if name not in names and isinstance(names, dict):  # a table that plugins extend
        plugins.load_inherited()
    return name in names


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _tuple(field: dataclasses.Field, value: Any, where: str) -> tuple:
    """Converts a list or tuple to the field's tuple type."""
    inner = get_args(field.type)
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} is {value!r}: write a tuple, such as {(value,)!r}.")
    if inner and inner[-1] is not ... and len(value) != len(inner):
        raise UserError(
            f"{where} is {tuple(value)!r}: write {len(inner)} values, such as {field.default!r}."
        )
    if inner and inner[0] is int:
        value = [int(v) if isinstance(v, float) and v.is_integer() else v for v in value]
    names = field.metadata.get("names")
    for name in value if names is not None else ():
        if not _known(name, names):
            raise UserError(f"{where} has {name!r}: choose from {', '.join(names)}.")
    if len(value) < field.metadata.get("items", 0):
        raise UserError(f"{where} is empty: name at least one of {', '.join(names)}.")
    if names and len(set(value)) < len(value):
        raise UserError(f"{where} is {tuple(value)!r}: remove the duplicates.")
    return _tuples(value)


def _check_range(limits: Mapping[str, Any], value: Any, where: str) -> None:
    """Raises UserError for numbers out of range; NaN is always out of range."""
    if "least" not in limits:
        return
    numbers = list(value) if isinstance(value, tuple) else [value]
    if not all(_within(number, limits) for number in numbers):
        few = "numbers" if len(numbers) > 1 else "a number"
        raise UserError(f"{where} is {value!r}: use {few} {range_text(limits)}.")
    if limits.get("rising") and numbers[0] > numbers[1]:
        raise UserError(f"{where} is {value!r}: write the smaller number first.")


def _within(value: Any, limits: Mapping[str, Any]) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    outside = limits.get("open_at", "")
    over = value > limits["least"] if "least" in outside else value >= limits["least"]
    under = value < limits["most"] if "most" in outside else value <= limits["most"]
    return over and under


def range_text(limits: Mapping[str, Any]) -> str:
    """Describes a field's limits, such as 'of 1 or more'; '' without limits."""
    if "least" not in limits:
        return ""
    least, most, outside = limits["least"], limits["most"], limits.get("open_at", "")
    if least == -math.inf:
        return "that is finite"
    if most == math.inf:
        return f"above {least:g}" if "least" in outside else f"of {least:g} or more"
    if not outside:
        return f"between {least:g} and {most:g}"
    low = f"above {least:g}" if "least" in outside else f"of {least:g} or more"
    return f"{low} and {'below' if 'most' in outside else 'at most'} {most:g}"


# -- nested sections


def _filled(field: dataclasses.Field, value: Any, where: str) -> Any:
    """Converts all mappings in a value to the dataclasses of the field's type."""
    table = field.metadata.get("table")
    if table is not None:
        return {
            name: _made(_of_table(table, name, where), settings, f"{where}.{name}")
            for name, settings in value.items()
        }
    types = (field.type, *get_args(field.type))
    inner = next((kind for kind in types if dataclasses.is_dataclass(kind)), None)
    if inner is None:
        return value
    if inner is field.type:
        return _made(inner, value, where)
    if isinstance(value, Mapping):
        return {name: _made(inner, item, f"{where}.{name}") for name, item in value.items()}
    return tuple(_made(inner, item, f"{where}[{i}]") for i, item in enumerate(value))


def _made(spec: type, value: Any, where: str) -> Any:
    return make(spec, value, where) if isinstance(value, Mapping) else value


def _of_table(table: Mapping[str, type], name: str, where: str) -> type:
    if name not in table:
        new = renames.OBJECTIVES.get(name, "")
        raise UserError(
            f"{where}.{name} is now {where}.{new}."
            if new in table
            else unknown_key(name, where, table)
        )
    return table[name]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
