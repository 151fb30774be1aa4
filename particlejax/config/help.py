# SPDX-License-Identifier: Apache-2.0
"""Config help: every key with its value, valid values and meaning, as printed by `--help`.

The specs are the only source. A key's meaning is the comment beside or above its field in the
source file; a section's is its dataclass docstring; types and limits come from field metadata. This
module also finds suggestions for unknown keys.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import linecache
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_origin

from particlejax.config import schema
from particlejax.config.fields import Spec, range_text
from particlejax.config.synonyms import last_part, synonyms
from particlejax.core.errors import UserError
from particlejax.core.suggest import did_you_mean

TOP = "config"
_MOST_PLACES = 4  # maximum number of suggestions in an error
_KINDS = {
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    str: ("string", "strings"),
    bool: ("True | False", "True | False"),
}


class Row(NamedTuple):
    """A key: its value in the config, default, valid values and meaning."""

    name: str
    value: Any
    default: Any
    allowed: str
    comment: str


class Section(NamedTuple):
    """A section of a config.

    path: such as 'config.stages.finetune.optim'. text: its description. listed: False for a section
    that the config lacks, which is shown only on request.
    """

    path: str
    text: str
    rows: tuple[Row, ...]
    listed: bool = True


def sections(spec: type, values: Mapping[str, Any]) -> list[Section]:
    """Returns all sections of a config of this spec, from the top down.

    values: nested dicts of the config; missing keys have the spec's default.
    """
    return list(_sections(schema.Place(spec=spec), values, TOP, spec))


def _sections(
    place: schema.Place,
    values: Mapping[str, Any],
    where: str,
    top: type,
    listed: bool = True,
    role: str = "",
) -> Iterator[Section]:
    rows, inner = [], []
    meaning = comments(place.spec)
    for name, field in schema.fields_of(place.spec).items():
        below, path = schema.child(place, name, top), f"{where}.{name}"
        value = values[name] if name in values else _default(field)
        if below.spec and not below.partial:
            settings = value if isinstance(value, Mapping) else {}
            inner += _sections(below, settings, path, top, listed, meaning.get(name, ""))
            continue
        rows.append(Row(name, value, _default(field), allowed(below), meaning.get(name, "")))
        if below.table is not None or (below.item_spec and below.is_mapping):
            for item in dict.fromkeys([*value, *schema.names(below)]):
                within = schema.child(below, item, top)
                if within:
                    is_match = listed and item in value
                    inner += _sections(within, value.get(item, {}), f"{path}.{item}", top, is_match)
        elif below.item_spec:
            inner += _sections(schema.Place(spec=below.item_spec), {}, f"{path}[]", top, False)
    role = f"{role[0].upper()}{role[1:]}." if role else ""
    text = " ".join(part for part in (docstring(place.spec), role) if part)
    yield Section(where, text, tuple(rows), listed)
    yield from inner


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    return dataclasses.asdict(value) if isinstance(value, Spec) else value


# -- comments and docstrings in the source


def comments(spec: type) -> dict[str, str]:
    """Returns the comments of a spec's fields, including inherited ones; {} without source."""
    comments_by_key: dict[str, str] = {}
    for base in reversed(spec.__mro__):
        if base is not object:
            comments_by_key |= _comments_of_class(base)
    return comments_by_key


def docstring(spec: type) -> str:
    """Returns a spec's description as one paragraph; '' for a docstring made by dataclasses."""
    text = vars(spec).get("__doc__") or ""
    return "" if text.startswith(f"{spec.__name__}(") else " ".join(text.split())


def _comments_of_class(spec: type) -> dict[str, str]:
    try:
        file = inspect.getsourcefile(spec)
    except (OSError, TypeError):  # defined in an interactive session
        return {}
    return _comments_of_file(file).get(spec.__qualname__, {}) if file else {}


@functools.cache
def _comments_of_file(file: str) -> dict[str, dict[str, str]]:
    """Returns the comments of annotated fields for all classes of a source file."""
    lines = linecache.getlines(file)
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(iter(lines).__next__):
        if token.type == tokenize.COMMENT:
            kind = beside if token.line[: token.start[1]].strip() else alone
            kind[token.start[0]] = token.string.lstrip("# ").rstrip()
    comments_by_class: dict[str, dict[str, str]] = {}
    for name, node in _classes(ast.parse("".join(lines)), ""):
        fields = comments_by_class.setdefault(name, {})
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                first = item.lineno
                while first - 1 in alone:
                    first -= 1
                both = {**alone, **beside}
                text = [both[line] for line in range(first, item.end_lineno + 1) if line in both]
                fields[item.target.id] = " ".join(text)
    return comments_by_class


def _classes(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from _classes(node, f"{prefix}{node.name}.")


# -- valid values


def allowed(place: schema.Place) -> str:
    """Describes the valid values of a key."""
    field = place.field
    if place.partial:
        return f"some of the keys of {TOP}.{field.name}"
    if place.table is not None:
        return f"sections out of {', '.join(place.table)}"
    if place.is_mapping:
        return "sections of any name" if place.item_spec else "a dict"
    if place.item_spec:
        return f"dicts with keys out of {', '.join(schema.fields_of(place.item_spec))}"
    kind, names = field.type, field.metadata.get("names")
    several = kind is tuple or get_origin(kind) is tuple
    if names is not None and not several:
        return " | ".join(names)
    if names is not None:
        return f"some of {', '.join(names)}" if names else "names that plugins add"
    if several:
        text = _tuple_text(get_args(kind))
    else:
        text = _KINDS.get(kind, ("any value", ""))[0]
    text = f"{text} {range_text(field.metadata)}".strip()
    return f"{text}, ascending" if field.metadata.get("rising") else text


def _tuple_text(kinds: tuple[Any, ...]) -> str:
    if not kinds:
        return "a tuple"
    plural = _KINDS.get(kinds[0], ("", "values"))[1]
    return f"tuple of {plural}" if kinds[-1] is ... else f"{len(kinds)} {plural}"


# -- rendering


def render(shown: Sequence[Section], width: int) -> str:
    """Formats sections as aligned text of lines of at most `width` characters."""
    return "\n\n".join(_render_section(section, max(width, 60)) for section in shown)


def _render_section(section: Section, width: int) -> str:
    lines = [section.path + ("" if section.listed else "  (not in this config yet)")]
    lines += textwrap.wrap(section.text, width, initial_indent="  ", subsequent_indent="  ")
    values = [_short(row.value) for row in section.rows]
    names = max((len(row.name) for row in section.rows), default=0)
    longest = max((len(value) for value in values), default=0)
    column = 2 + names + 2 + min(longest, width // 5) + 2
    for row, value in zip(section.rows, values, strict=True):
        head = f"  {row.name:<{names}}  {value}"
        text = _row_text(row)
        if len(head) > column - 2:
            lines.append(head)
            head = ""
        indent = " " * column
        lines += textwrap.wrap(
            text,
            width,
            initial_indent=f"{head:<{column}}",
            subsequent_indent=indent,
            break_on_hyphens=False,
        ) or [head]
    return "\n".join(lines)


def _row_text(row: Row) -> str:
    changed = "" if row.value == row.default else f"(default {_short(row.default)})"
    return " ".join(part for part in (row.comment, f"[{row.allowed}]", changed) if part)


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) > 60 and isinstance(value, Mapping):
        text = f"{{{', '.join(map(str, value))}}}"
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- search


def find(all_sections: Sequence[Section], name: str) -> list[Section]:
    """Returns the sections called `name` (or 'finetune.optim', 'config.data') with their
    subsections; without any, the keys of that name. Raises UserError with the closest name.
    """
    for wanted in (name, *synonyms(name)):
        hits = [s for s in all_sections if _ends(s.path.replace("[]", ""), wanted)]
        hits = [s for s in hits if s.listed] or hits[:1]
        if hits:
            listed = [s.path for s in hits]
            return [
                s
                for s in all_sections
                if s.path in listed
                or (s.listed and any(s.path.startswith(f"{path}.") for path in listed))
            ]
        keys = [
            s._replace(rows=tuple(r for r in s.rows if _ends(f"{s.path}.{r.name}", wanted)))
            for s in all_sections
        ]
        keys = [s for s in keys if s.rows]
        if keys:
            return [s for s in keys if s.listed] or keys[:1]
    known = dict.fromkeys(last_part(s.path.replace("[]", "")) for s in all_sections)
    known |= dict.fromkeys(row.name for s in all_sections for row in s.rows)
    raise UserError(f"--help={name}: there is no section {name!r}, {did_you_mean(name, known)}")


def unknown_key(all_sections: Sequence[Section], path: str, where: str) -> str:
    """Returns the error for a path that the config lacks, with full paths of likely keys: the same
    name or a synonym elsewhere, else the closest match.

    path: such as 'config.optim.lr'. where: its last existing section, here 'config'.
    """
    part, _, rest = path.removeprefix(f"{where}.").partition(".")
    possible, present = _paths(all_sections), _paths(all_sections, absent=False)
    siblings = [last_part(place) for place in possible if place.rpartition(".")[0] == where]
    close = [f"{where}.{name}" for name in difflib.get_close_matches(part, siblings, 1, 0.5)]
    called = _called(present, part)
    within = [f"{place}.{rest}" for place in (*called, *close)] if rest else called
    meant = [place for place in within if place in possible]
    if not meant and rest:  # a wrong section: search for the key alone
        meant = _called(present, last_part(rest))
    meant = meant or close or called
    if not meant:
        known = dict.fromkeys(map(last_part, present))
        matches = difflib.get_close_matches(part, known, 1, 0.6)
        meant = [place for place in present if last_part(place) in matches]
    if not meant:
        return f"{where} has no key {part!r}: {did_you_mean(part, siblings, f'{where}.')}"
    meant = [place for place in meant if place.rpartition(".")[0] == where] or meant
    parts = set(path.split("."))
    meant = sorted(meant, key=lambda place: -len(parts & set(place.split("."))))
    more = ", ..." * (len(meant) > _MOST_PLACES)
    places = " or ".join(meant[:_MOST_PLACES])
    return f"{where} has no key {part!r}: did you mean {places}{more}?"


def _paths(all_sections: Sequence[Section], absent: bool = True) -> dict[str, None]:
    """Returns the paths of all keys in order; absent: include sections that the config lacks."""
    places = {}
    for section in all_sections:
        if section.listed or absent:
            places[section.path] = None
            places |= dict.fromkeys(f"{section.path}.{row.name}" for row in section.rows)
    return places


def _called(places: Mapping[str, None], name: str) -> list[str]:
    """Returns the paths that end with `name`, else those of its first known synonym."""
    for wanted in (name, *synonyms(name)):
        matches = [place for place in places if _ends(place, wanted)]
        if matches:
            return matches
    return []


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
