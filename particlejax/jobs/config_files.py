# SPDX-License-Identifier: Apache-2.0
"""Experiment files: Python files whose `get_config` returns a config that the command line changes.

A name such as `quickstart`, `pretrain/mae` or `quickstart:tiny` is looked up in ./experiments, then
in the experiments folder of the checkout.
"""

import ast
import inspect
import runpy
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, get_args, get_origin

import ml_collections

from particlejax.config import help as config_help
from particlejax.config import jobs, plugins, renames, schema
from particlejax.config.fields import as_dict, unknown_key
from particlejax.core.errors import UserError
from particlejax.core.suggest import did_you_mean

FOLDER = "experiments"
_CHECKOUT = Path(__file__).parents[2]
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class UnknownExperiment(UserError):
    """No experiment file has this name; the command line then lists all experiments."""


class ExperimentFailed(UserError):
    """The code of an experiment file raised an exception of its own.

    trace: its traceback from the file on.
    """

    def __init__(self, sentence: str, trace: str) -> None:
        super().__init__(sentence)
        self.trace = trace


# -- finding them


def folders() -> list[Path]:
    """The folders of experiments: the working directory's, then the checkout's."""
    local = Path(FOLDER)
    checkout = _CHECKOUT / FOLDER
    existing = [local] if local.is_dir() else []
    if checkout.is_dir() and not (existing and local.samefile(checkout)):
        existing.append(checkout)
    return existing


def find(name: str) -> Path:
    """Path of an experiment, from a path or a name such as 'pretrain/mae'.

    Raises UnknownExperiment if there is none, and UserError for a folder or a file that is not
    Python.
    """
    path = Path(name)
    tried = [path, _CHECKOUT / path]
    tried += [folder / file for folder in folders() for file in (name, f"{name}.py")]
    file = next((file for file in tried if file.is_file()), None)
    if file is None:
        if folder := next((file for file in tried if file.is_dir()), None):
            raise UserError(_folder_sentence(name, folder))
        raise UnknownExperiment(f"there is no experiment {name!r}: {_closest(name)}")
    if file.suffix != ".py":
        raise UserError(
            f"{name} is not an experiment file: give a Python file with a function get_config, "
            f"such as {FOLDER}/quickstart.py."
        )
    return file


def _folder_sentence(name: str, folder: Path) -> str:
    """The error for a folder in place of a file."""
    inside = [file for file in sorted(folder.glob("*.py")) if _get_config(_tree(file))]
    remedy = f"such as {inside[0]}" if inside else f"such as {FOLDER}/quickstart.py"
    return f"{name} is a folder, not an experiment file: give a Python file, {remedy}."


def _closest(name: str) -> str:
    """The suggestion for a wrong name: a path for a path, a name for a name."""
    if new := renames.FILES.get(name):
        return f"it is now {new}."
    if new := renames.FILES.get(f"{FOLDER}/{name}.py"):
        return f"it is now {_name(Path(FOLDER), Path(new))}."
    written = [(folder, file) for folder in folders() for file in _files(folder)]
    if name.endswith(".py") or name.startswith(f"{FOLDER}/"):
        return did_you_mean(name, [str(file) for _, file in written])
    return did_you_mean(name, [_name(folder, file) for folder, file in written])


def _files(folder: Path) -> list[Path]:
    """The experiment files of a folder, top level first."""
    return sorted(folder.rglob("*.py"), key=lambda file: (len(file.parts), file))


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


def listing(width: int) -> str:
    """All experiments with the first paragraph of their docstrings, wrapped to `width` columns;
    files are parsed, not executed.
    """
    lines: list[str] = []
    for folder in folders():
        rows = {_name(folder, file): _summary(file) for file in _files(folder)}
        column = max(map(len, rows), default=0) + 4
        lines += [f"Experiments in {folder}:", ""]
        for name, text in rows.items():
            lines += textwrap.wrap(
                text,
                max(width, 60),
                initial_indent=f"  {name:<{column - 2}}",
                subsequent_indent=" " * column,
            ) or [f"  {name}"]
        lines.append("")
    if not lines:
        lines = [f"No folder {FOLDER}/ found: give the path of an experiment file.", ""]
    return "\n".join(lines)


def describe(file: str) -> tuple[str, str]:
    """First paragraphs of the docstrings of FILE and of its get_config, which names the arguments.
    The file is parsed, not executed; both are '' if it cannot be read.
    """
    path = find(file.partition(":")[0])
    tree = _tree(path)
    get_config = _get_config(tree)
    arguments = ast.get_docstring(get_config) if get_config else ""
    return _paragraph(ast.get_docstring(tree)), _paragraph(arguments)


def _get_config(tree: ast.Module) -> ast.FunctionDef | None:
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return next((node for node in functions if node.name == "get_config"), None)


def _summary(path: Path) -> str:
    return _paragraph(ast.get_docstring(_tree(path)))


def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ast.Module(body=[], type_ignores=[])


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


# -- loading and changing them


def configure(file: str, overrides: Sequence[str]) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config of FILE or FILE:ARGUMENT with overrides, and the overridden keys.

    Raises UserError like `load` and `apply_overrides`, and if the file gives no config.
    """
    config = load(file)
    if isinstance(config, ml_collections.FrozenConfigDict):
        config = ml_collections.ConfigDict(config)
    if isinstance(config, dict):
        config = ml_collections.ConfigDict(config, allow_dotted_keys=True)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"get_config of {find(file.partition(':')[0])} returns {type(config).__name__}: "
            "return a ConfigDict, such as ConfigDict(section(Experiment, ...))."
        )
    return config, apply_overrides(config, overrides)


def load(file: str) -> ml_collections.ConfigDict:
    """The config of FILE or FILE:ARGUMENT without overrides; FILE is a path or a name.

    Raises UserError for an unknown argument, a missing file or a file that is not an experiment,
    and ExperimentFailed for an exception in the code of the file.
    """
    name, _, arg = file.partition(":")
    if not name:
        raise UserError(
            f"no experiment: add --config {FOLDER}/quickstart.py or another file of {FOLDER}/."
        )
    path = find(name)
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if not callable(get_config):
            raise UserError(
                f"{path} is not an experiment file: it has no function get_config that returns a "
                "ConfigDict; add one, or give another file."
            )
        args = (arg,) if arg else ()
        _check_arguments(path, get_config, args)
        return get_config(*args)
    except UserError:
        raise
    except Exception as error:
        raise _failure(path, error) from error


def _check_arguments(path: Path, get_config: Callable[..., Any], args: Sequence[str]) -> None:
    """Raises UserError if get_config cannot be called with these arguments."""
    try:
        inspect.signature(get_config).bind(*args)
    except TypeError as error:
        remedy = (
            f"leave out ':{args[0]}', or write `def get_config(arg: str = \"\")`"
            if args
            else f"write --config {path}:ARGUMENT, or give its parameter a default"
        )
        raise UserError(f"get_config of {path}: {error}: {remedy}.") from error


def _failure(path: Path, error: Exception) -> UserError:
    """The error of an experiment file that cannot be run: one sentence for syntax, imports and
    reading; other exceptions keep the traceback of the user's code.
    """
    if isinstance(error, SyntaxError) and Path(error.filename or path).is_file():
        by = "" if error.filename in (None, str(path)) else f", which {path} imports"
        line = f", line {error.lineno}" if error.lineno else ""
        return UserError(f"{error.filename or path}{line}: {error.msg}; correct the file{by}.")
    trace = _from_file(error.__traceback__, path)
    if trace is None:
        return UserError(f"{path} cannot be read ({error}): check the file.")
    place, reason = f"{path}, line {trace.tb_lineno}", " ".join(str(error).split())
    if isinstance(error, ImportError):
        *_, last = (f for f in traceback.extract_tb(trace) if not f.filename.startswith("<"))
        deeper = "" if last.filename == str(path) else f" (in {last.filename}, line {last.lineno})"
        return UserError(
            f"{place}: {reason}{deeper}: correct the import, install its package, or run from "
            "the folder that contains it."
        )
    if isinstance(error, ValueError) and "dots in field names" in str(error):
        return UserError(
            f"{place}: a ConfigDict takes no name with a dot: give names with dots to `section`, "
            "or return a plain dict."
        )
    return ExperimentFailed(
        f"{place}: {type(error).__name__}: {reason}: correct the file.",
        "".join(traceback.format_exception(error.with_traceback(trace))),
    )


def _from_file(trace: TracebackType | None, path: Path) -> TracebackType | None:
    """The traceback from the first frame of a file on; None without one."""
    while trace is not None and trace.tb_frame.f_code.co_filename != str(path):
        trace = trace.tb_next
    return trace


def apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> list[str]:
    """Applies overrides 'some.key=value' to the config and returns their keys.

    Values are Python literals, or plain text parsed by the key's type: 1e3 and 1_000 are integers,
    a,b is a tuple, {'key': value} changes some keys of a section; 'some.key' alone is True. An
    objective that is not in the file starts from its defaults. Raises UserError for an unknown key;
    `jobs.parse_job` checks values.
    """
    changed: list[str] = []
    # plugins first: they register names that other keys use
    for text in sorted(overrides, key=lambda text: not text.startswith("plugins=")):
        key, equals, value = text.partition("=")
        _put(config, key.strip(), value if equals else None, changed)
        if key == "plugins":
            plugins.load(*config.plugins)
    return changed


def spec_of(config: Mapping[str, Any]) -> type:
    """The dataclass of a config, which depends on its job."""
    return jobs.spec_of(config.get("job", ""))


def _put(config: ml_collections.ConfigDict, key: str, text: str | None, changed: list[str]) -> None:
    top = spec_of(config)
    node, place, where = config, schema.Place(spec=top), config_help.TOP
    *parents, last = _parts(config, key)
    for part in parents:
        below = _below(config, node, place, part, key, where)
        if part not in node:
            _fill(node, part, below)
        if not isinstance(node[part], ml_collections.ConfigDict):
            raise UserError(_unknown(config, f"{where}.{part}.{last}", f"{where}.{part}"))
        node, place, where = node[part], below, f"{where}.{part}"
    below = _below(config, node, place, last, key, where)
    if text is None:
        if below.field is None or below.field.type is not bool:
            raise UserError(f"{where}.{last} has no value: write --{where}.{last}=VALUE.")
        text = "true"
    value = _value(text, below)
    described = below.spec or below.table is not None or below.item_spec
    if described and not below.is_leaf and isinstance(value, Mapping):
        if last not in node:
            _fill(node, last, below)
        for name, item in value.items():
            _put(config, f"{key}.{name}", item if isinstance(item, str) else repr(item), changed)
        return
    if below.spec or below.table is not None:
        known = schema.names(below)
        example = known[0] if below.spec else f"{known[0]}.weight"
        raise UserError(
            f"{where}.{last} is a section: set one of its keys ({', '.join(known[:6])}, ...), "
            f"such as --{where}.{last}.{example}=VALUE."
        )
    if isinstance(value, dict):
        value = ml_collections.ConfigDict(value, allow_dotted_keys=True)
    with node.unlocked(), node.ignore_type():
        node[last] = value
    changed.append(key)


def _parts(config: ml_collections.ConfigDict, key: str) -> list[str]:
    """The names of a dotted path; a name that the config has may itself hold dots."""
    parts, rest, node = [], key.split("."), config
    while rest:
        lengths = range(len(rest), 1, -1) if isinstance(node, ml_collections.ConfigDict) else ()
        length = next((n for n in lengths if ".".join(rest[:n]) in node), 1)
        part, rest = ".".join(rest[:length]), rest[length:]
        node = node.get(part) if isinstance(node, ml_collections.ConfigDict) else None
        parts.append(part)
    return parts


def _below(
    config: ml_collections.ConfigDict,
    node: ml_collections.ConfigDict,
    place: schema.Place,
    part: str,
    key: str,
    where: str,
) -> schema.Place:
    """The schema of `part`. Raises UserError if neither the spec nor the config has it."""
    below = schema.child(place, part, spec_of(config))
    if below is not None and (part in node or not place.item_spec):
        return below
    if part in node or (place.is_mapping and not place.item_spec and place.table is None):
        return _FREE
    if place.table is not None and part not in renames.OBJECTIVES:
        raise UserError(unknown_key(part, where, place.table))
    raise UserError(_unknown(config, f"{config_help.TOP}.{key}", where))


_FREE = schema.Place()  # of a dict without a spec


def _fill(node: ml_collections.ConfigDict, name: str, place: schema.Place) -> None:
    """Adds a section with its spec's defaults if the file has none; a section of overrides is added
    empty.
    """
    with node.unlocked(), node.ignore_type():
        filled = {} if place.partial or not place.spec else as_dict(place.spec())
        node[name] = ml_collections.ConfigDict(filled)


def _unknown(config: ml_collections.ConfigDict, path: str, where: str) -> str:
    key = path.removeprefix(f"{config_help.TOP}.")
    new = renames.path(spec_of(config), key)
    if new != key:
        return f"config.{key} is now config.{new}."
    sections = config_help.sections(spec_of(config), config.to_dict())
    return config_help.unknown_key(sections, path, where)


# -- values as they are written


def _value(text: str, place: schema.Place) -> Any:
    """Parses a text by the key's type; a text that does not fit is kept, and the config check names
    it.
    """
    kind = place.field.type if place.field is not None else None
    if kind is str:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return _literal(text) if quoted else text
    if kind is bool:
        return _WORDS.get(text.lower(), text)
    if kind in (int, float):
        return _number(text, kind)
    if kind is tuple or get_origin(kind) is tuple:
        return _tuple(text, get_args(kind))
    return _literal(text)


def _number(text: str, kind: type) -> Any:
    try:
        number = float(text) if kind is float else ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    if kind is int and isinstance(number, float) and number.is_integer():
        return int(number)  # 1e3
    return number


def _tuple(text: str, kinds: tuple[Any, ...]) -> Any:
    value = _literal(text)
    if isinstance(value, str) and value == text:  # strings without quotes
        value = [_literal(part) for part in text.strip("()[]").split(",") if part.strip()]
        value = [part.strip() if isinstance(part, str) else part for part in value]
    value = tuple(value) if isinstance(value, list | tuple) else (value,)
    if kinds and kinds[0] is str:  # a class name may look like a number
        return tuple(str(item) if isinstance(item, int | float) else item for item in value)
    return value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
