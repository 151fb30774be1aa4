# SPDX-License-Identifier: Apache-2.0
"""How reference implementations name and lay out the parameters of an architecture, and how we do: both ways, exactly.

A mapping is made from the shapes of our parameters: rules turn a module's path into the reference's, a second table
turns its leaf's name, and a layout turns the axes. C3D goes by the names of its common PyTorch ports, I3D by those of
its Flax port, I3D-R50 (`resnet`) and X3D by pytorchvideo's.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from particlejax import tree
from particlejax.typing import Params, UserError

Turn = Callable[[np.ndarray], np.ndarray]
Rules = tuple[tuple[str, str], ...]


class Layout(NamedTuple):
    """The reference's array to ours, and back."""

    ours: Turn
    theirs: Turn


class Entry(NamedTuple):
    """One parameter: our path, the reference's name and how its axes turn."""

    ours: str
    theirs: str
    layout: Layout


class Names(NamedTuple):
    """All parameters of an architecture, and the reference's counters of batches, which mean nothing to us."""

    entries: tuple[Entry, ...]
    counters: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What became of the arrays of a file: names are the reference's, in `missing` ours."""

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # parameters that the file does not have: left as they were
    unused: list[str] = field(default_factory=list)  # arrays that this architecture has no place for
    reshaped: list[str] = field(default_factory=list)  # matched after axes of length one were added or dropped
    cast: dict[str, str] = field(default_factory=dict)  # matched, of another type than our parameter: for the way back
    counters: dict[str, int] = field(default_factory=dict)  # for the way back


_SAME = Layout(lambda a: a, lambda a: a)
_CONV = Layout(lambda a: a.transpose(2, 3, 4, 1, 0), lambda a: a.transpose(4, 3, 0, 1, 2))  # [O, I, t, h, w]
_DENSE = Layout(np.transpose, np.transpose)  # [O, I]
_POINT = Layout(lambda a: a.reshape(a.shape[-2:]), lambda a: a[None, None, None])  # [1, 1, 1, I, O]
_POINT_TORCH = Layout(lambda a: a.reshape(a.shape[:2]).T, lambda a: a.T[..., None, None, None])  # [O, I, 1, 1, 1]

_TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_BRANCH: Rules = ((r"([abc])", r"branch2.conv_\1"), (r"norm_([ac])", r"branch2.norm_\1"),
                  (r"shortcut", r"branch1_conv"), (r"shortcut_norm", r"branch1_norm"))


def _staged(block: Mapping[int, int], inner: Rules) -> Rules:
    """The rules of what is within a block, for every block of every stage: {our stage: the reference's}."""
    return tuple((rf"stage{stage}_block(\d+)/{ours}", rf"blocks.{at}.res_blocks.\1." + theirs.replace(r"\1", r"\2"))
                 for stage, at in block.items() for ours, theirs in inner)


_RULES: dict[str, Rules] = {
    "c3d": ((r"head", r"fc8"), (r"(conv\w+|fc\d)", r"\1")),
    "i3d": ((r"head", r"Logits.Conv3d_0c_1x1.Conv_0"), (r"(Mixed_\w+)/(\w+)/(\w+)/conv", r"\1.\2.\3.Conv_0"),
            (r"(Mixed_\w+)/(\w+)/(\w+)/norm", r"\1.\2.\3.BatchNorm_0"), (r"(Conv3d_\w+)/conv", r"\1.Conv_0"),
            (r"(Conv3d_\w+)/norm", r"\1.BatchNorm_0")),
    "resnet": ((r"stem", r"blocks.0.conv"), (r"stem_norm", r"blocks.0.norm"), (r"head", r"blocks.6.proj"),
               *_staged({1: 1, 2: 3, 3: 4, 4: 5}, (*_BRANCH, (r"norm_b", r"branch2.norm_b")))),  # blocks.2 is a pool
    # pytorchvideo calls the stem's convolution in space conv_t and that in time conv_xy.
    "x3d": ((r"stem_space", r"blocks.0.conv.conv_t"), (r"stem_time", r"blocks.0.conv.conv_xy"),
            (r"stem_norm", r"blocks.0.norm"), (r"last", r"blocks.5.pool.pre_conv"),
            (r"last_norm", r"blocks.5.pool.pre_norm"), (r"project", r"blocks.5.pool.post_conv"),
            (r"head", r"blocks.5.proj"),
            *_staged({1: 1, 2: 2, 3: 3, 4: 4}, (*_BRANCH, (r"norm_b", r"branch2.norm_b.0"),
                     (r"squeeze/down", r"branch2.norm_b.1.block.0"), (r"squeeze/up", r"branch2.norm_b.1.block.2")))),
}


def names_of(kind: str, shapes: Params) -> Names:
    """The names of an architecture ('c3d', 'i3d', 'resnet' or 'x3d') whose parameters have these shapes."""
    flat = tree.flatten(shapes)
    entries = tuple(_entry(kind, path, flat) for path in flat)
    counters = () if kind == "i3d" else tuple(
        e.theirs.replace("running_mean", "num_batches_tracked") for e in entries if e.ours.endswith("/mean"))
    return Names(entries, counters)


def import_params(params: Params, arrays: Mapping[str, np.ndarray], names: Names) -> tuple[Params, Report]:
    """`params` (arrays or shapes) with every leaf that the arrays have, in float32 or whatever type the leaf has.

    Names count from any common prefix on, as training states and wrappers put one before them; our own names, dotted,
    do as well. Raises UserError where a shape differs by more than axes of length one, or where nothing matches.
    """
    prefix, ours = _prefix(arrays, names)
    report, taken, used = Report(), {}, set()
    leaves = tree.flatten(params)
    for entry in names.entries:
        name = prefix + (entry.ours.replace("/", ".") if ours else entry.theirs)
        if name not in arrays:
            report.missing.append(entry.ours)
            continue
        taken[entry.ours] = _fitted(arrays[name], name, entry._replace(layout=_SAME) if ours else entry,
                                    leaves[entry.ours], report)
        used.add(name)
    for name in names.counters:
        if prefix + name in arrays and arrays[prefix + name].size == 1:
            report.counters[name] = int(arrays[prefix + name].reshape(()))
            used.add(prefix + name)
    if not taken:
        some = ", ".join(list(arrays)[:3])
        raise UserError(f"none of the {len(arrays)} arrays ({some}, ...) has a name of this architecture "
                        f"({names.entries[0].theirs}, ...): name the model that they are of with config.model.")
    report.unused.extend(sorted(set(arrays) - used))
    return tree.map_named(lambda path, leaf: taken.get(path, leaf), params), report


def export_params(params: Params, names: Names, report: Report) -> dict[str, np.ndarray]:
    """The parameters under the reference's names, in its layouts and types, with the counters that the report kept.

    `Report()` serves where they were not imported: float32, and counters that are 0.
    """
    leaves, found = tree.flatten(params), {}
    for entry in names.entries:
        array = np.ascontiguousarray(entry.layout.theirs(np.asarray(leaves[entry.ours])))
        found[entry.theirs] = array.astype(jnp.dtype(report.cast.get(entry.theirs, array.dtype)))
    return found | {name: np.array(report.counters.get(name, 0), np.int64) for name in names.counters}


def head_classes(arrays: Mapping[str, np.ndarray], names: Names) -> int:
    """How many classes the head among the arrays has, 0 where there is none."""
    prefix, ours = _prefix(arrays, names)
    bias = next(e for e in names.entries if e.ours == "head/bias")
    array = arrays.get(prefix + (bias.ours.replace("/", ".") if ours else bias.theirs))
    return 0 if array is None else array.size


def _entry(kind: str, path: str, flat: Mapping[str, Any]) -> Entry:
    module, _, leaf = path.rpartition("/")
    theirs = next(found.expand(template) for pattern, template in _RULES[kind]
                  if (found := re.fullmatch(pattern, module)))
    if kind == "i3d":
        collection = "batch_stats" if leaf in ("mean", "var") else "params"
        return Entry(path, f"{collection}.{theirs}.{leaf}", _POINT if path == "head/kernel" else _SAME)
    return Entry(path, f"{theirs}.{_TORCH_LEAVES[leaf]}", _torch_layout(path, flat))


def _torch_layout(path: str, flat: Mapping[str, Any]) -> Layout:
    dims = len(flat[path].shape)
    if path == "fc6/kernel":
        return _flattened(flat["conv5b/bias"].shape[0], flat[path].shape[0])
    if "/squeeze/" in path and dims == 2:
        return _POINT_TORCH
    return {5: _CONV, 2: _DENSE}.get(dims, _SAME)


def _flattened(channels: int, size: int) -> Layout:
    """C3D's first Dense layer: theirs reads channels before places, ours after; one frame is left there."""
    side = round((size // channels) ** 0.5)

    def ours(a: np.ndarray) -> np.ndarray:
        return a.reshape(-1, channels, side, side).transpose(2, 3, 1, 0).reshape(size, -1)

    def theirs(a: np.ndarray) -> np.ndarray:
        return a.reshape(side, side, channels, -1).transpose(3, 2, 0, 1).reshape(-1, size)

    return Layout(ours, theirs)


def _prefix(arrays: Mapping[str, np.ndarray], names: Names) -> tuple[str, bool]:
    """What stands before the names in a file, and whether they are our own: as matches the most."""
    best, most = ("", False), 0
    for ours in (False, True):
        known = [e.ours.replace("/", ".") if ours else e.theirs for e in names.entries]
        ends = [name for name in arrays for last in (known[0], known[-1]) if name.endswith(last)]
        prefixes = {"", *(name.removesuffix(last) for name in ends for last in (known[0], known[-1]))}
        for prefix in sorted(prefixes, key=len):
            count = sum(prefix + name in arrays for name in known)
            if count > most:
                best, most = (prefix, ours), count
    return best


def _fitted(array: np.ndarray, name: str, entry: Entry, leaf: Any, report: Report) -> np.ndarray:
    """The array as our leaf, noted in the report. Raises UserError where it does not fit."""
    want = entry.layout.theirs(np.empty(leaf.shape, np.bool_)).shape
    if array.shape != want:
        if [n for n in array.shape if n != 1] != [n for n in want if n != 1]:
            hint = "set config.classes to the number of its classes" if entry.ours.startswith("head/") else (
                "name the model that the weights are of with config.model")
            raise UserError(f"array {name} has shape {array.shape} where the model wants {want}: {hint}.")
        report.reshaped.append(f"{name} {array.shape} to {want}")
        array = array.reshape(want)
    if array.dtype != leaf.dtype:
        report.cast[entry.theirs] = array.dtype.name
    report.matched.append(name)
    return np.ascontiguousarray(entry.layout.ours(array)).astype(leaf.dtype)
