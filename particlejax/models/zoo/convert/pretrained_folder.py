# SPDX-License-Identifier: Apache-2.0
"""Folders that the library transformers' `save_pretrained` wrote, and files that are no weights.

Such a folder holds config.json, the weights in one file or in shards with an index, and often
preprocessor_config.json.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from particlejax.core.errors import UserError

CONFIG = "config.json"
INDEX_SUFFIX = ".index.json"
# in the order in which transformers looks for them
WEIGHTS = tuple(
    name + suffix
    for name in ("model.safetensors", "pytorch_model.bin")
    for suffix in ("", INDEX_SUFFIX)
)
# later ones overrule earlier ones; from the third, its image or video processor
_PREPROCESSORS = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_MAX_LISTED = 4  # names in an error
_MAX_HEAD_BYTES = 512  # from the start of a file, which show what it is
_LFS = b"version https://git-lfs"
_HTML = (b"<!doctype", b"<html", b"<head", b"<?xml")


def snapshot(path: Path) -> Path:
    """The folder itself; of a folder of the hub's cache (models--USER--NAME) its snapshot.

    Raises UserError if the cache holds none, or several and no reference to one of them.
    """
    if not (path / "snapshots").is_dir():
        return path
    reference = path / "refs" / "main"
    snapshots = sorted(p for p in (path / "snapshots").iterdir() if p.is_dir())
    if reference.is_file():
        named = path / "snapshots" / reference.read_text(encoding="utf-8").strip()
        snapshots = [named] if named.is_dir() else snapshots
    if len(snapshots) != 1:
        raise UserError(
            f"{path} holds {len(snapshots)} snapshots: name one of them, or download it again."
        )
    return snapshots[0]


def weights_in(folder: Path) -> Path | None:
    """The file or index with the weights of a `save_pretrained` folder; None for another folder."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def config_of(path: Path) -> dict[str, Any]:
    """config.json of a `save_pretrained` folder, or of the folder of one of its files; else {}.

    A file's neighbors count only if the file has a name that `save_pretrained` gives. Raises
    UserError for a damaged one.
    """
    if path.is_file() and path.name not in WEIGHTS:
        return {}
    file = (path if path.is_dir() else path.parent) / CONFIG
    config = read_json(file) if file.is_file() else {}
    return config if {"model_type", "architectures"} & config.keys() else {}


def preprocessor_of(folder: Path) -> dict[str, Any]:
    """The preprocessing that the folder describes, {} if none. Raises UserError if damaged."""
    merged: dict[str, Any] = {}
    for name in _PREPROCESSORS:
        if (folder / name).is_file():
            content = read_json(folder / name)
            for key in ("image_processor", "video_processor"):
                nested = content.get(key)
                content = content | nested if isinstance(nested, dict) else content
            merged |= content
    return merged


def shards_of(index: Path) -> dict[Path, set[str]]:
    """Names of the arrays by shard, as an index lists them. Raises UserError for a wrong index."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index} lists no arrays (it has no 'weight_map'): fetch it again.")
    shards: dict[Path, set[str]] = {}
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(
                f"{index} names {file!r} as the file of {name}, which is none of its folder: fetch "
                "the index again."
            )
        shards.setdefault(index.parent / file, set()).add(name)
    missing = sorted(path.name for path in shards if not path.is_file())
    if missing:
        raise UserError(
            f"{index} names {len(shards)} files, but {listing(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not there: fetch the whole folder again."
        )
    return shards


def check_shard(index: Path, shard: Path, listed: set[str], found: Iterable[str]) -> None:
    """Raises UserError if a shard holds other arrays than its index says."""
    found = set(found)
    if listed != found:
        name = min(listed ^ found)
        says, holds = ("lists", "lacks") if name in listed else ("does not list", "holds")
        raise UserError(
            f"{index} {says} {name} in {shard.name}, which {holds} it: index and file are not of "
            "the same model, fetch the whole folder again."
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for another content."""
    refuse_other_content(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object: fetch it again.")
    return content


def refuse_other_content(path: Path) -> None:
    """Raises UserError for what a download leaves instead of a file: a git-lfs pointer or a web
    page.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_MAX_HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions.") from (
            error
        )
    if head.startswith(_LFS):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        of = f" to {int(size[1]):,} bytes" if size else ""
        raise UserError(
            f"{path} is a git-lfs pointer{of}, not the file itself: run `git lfs pull` in its "
            "repository, or download the file."
        )
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML):
        raise UserError(
            f"{path} is a web page, not the file itself: download it again by the link to the raw "
            "file (/resolve/ instead of /blob/), and log in where the page asks for it."
        )
    if path.suffix != ".json" and re.match(rb'\s*\{\s*"[\x20-\x7e\s]*', head) and b"\0" not in head:
        text = head[:60].decode(errors="replace").strip()
        raise UserError(f"{path} is text ({text}), not weights: download it again.")


def listing(names: Iterable[str]) -> str:
    """The first few names, and how many others there are."""
    names = list(names)
    more = f" and {len(names) - _MAX_LISTED} others" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
