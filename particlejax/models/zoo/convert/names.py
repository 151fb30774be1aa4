# SPDX-License-Identifier: Apache-2.0
"""Exact two-way mapping between the parameter names and layouts of reference implementations and
ours.

A mapping is built from the shapes of our parameters: rules convert a module's path to the
reference's, a second table converts leaf names, and a layout converts the axes. C3D follows its
common PyTorch ports, I3D its Flax port, I3D-R50 (`resnet`) and X3D pytorchvideo, YAMNet the layer
order of its TFLite file, Transformers (`transformer_names`) the library transformers.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from particlejax.core import tree
from particlejax.core.typing import Params, UserError
from particlejax.models.zoo.convert import resize, transformer_names
from particlejax.models.zoo.convert.layouts import (
    CONV,
    DENSE,
    SAME,
    Entry,
    Grid,
    Layout,
    Names,
    Rules,
)


@dataclass(frozen=True)
class Report:
    """Report of an import: names are the reference's, in `missing` ours."""

    matched: list[str] = field(default_factory=list)
    # parameters that the file lacks: left unchanged
    missing: list[str] = field(default_factory=list)
    # arrays without a parameter in this architecture
    unused: list[str] = field(default_factory=list)
    # matched after adding or removing axes of length one, or resizing
    reshaped: list[str] = field(default_factory=list)
    # matched, but of another dtype than our parameter: for export
    cast: dict[str, str] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)  # for export
    # names that differ in the file's own dialect: for export
    renamed: dict[str, str] = field(default_factory=dict)


_POINT = Layout(lambda a: a.reshape(a.shape[-2:]), lambda a: a[None, None, None])  # [1, 1, 1, I, O]
# [O, I, 1, 1, 1]
_POINT_TORCH = Layout(lambda a: a.reshape(a.shape[:2]).T, lambda a: a.T[..., None, None, None])
_POINT_TFLITE = Layout(lambda a: a[:, 0, 0].T, lambda a: a.T[:, None, None])  # [O, 1, 1, I]
# [O, h, w, I]
_IMAGE_TFLITE = Layout(
    lambda a: a.transpose(1, 2, 3, 0)[None], lambda a: a[0].transpose(3, 0, 1, 2)
)
_DEPTHWISE_TFLITE = Layout(lambda a: a[:, :, :, None], lambda a: a[:, :, :, 0])  # [1, h, w, C]

_TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_BRANCH: Rules = (
    (r"([abc])", r"branch2.conv_\1"),
    (r"norm_([ac])", r"branch2.norm_\1"),
    (r"shortcut", r"branch1_conv"),
    (r"shortcut_norm", r"branch1_norm"),
)


def _block_rules(block: Mapping[int, int], inner: Rules) -> Rules:
    """The rules within a block, for every block of every stage: {our stage: the reference's}."""
    return tuple(
        (
            rf"stage{stage}_block(\d+)/{path}",
            rf"blocks.{position}.res_blocks.\1." + reference_name.replace(r"\1", r"\2"),
        )
        for stage, position in block.items()
        for path, reference_name in inner
    )


_RULES: dict[str, Rules] = {
    "c3d": ((r"head", r"fc8"), (r"(conv\w+|fc\d)", r"\1")),
    "i3d": (
        (r"head", r"Logits.Conv3d_0c_1x1.Conv_0"),
        (r"(Mixed_\w+)/(\w+)/(\w+)/conv", r"\1.\2.\3.Conv_0"),
        (r"(Mixed_\w+)/(\w+)/(\w+)/norm", r"\1.\2.\3.BatchNorm_0"),
        (r"(Conv3d_\w+)/conv", r"\1.Conv_0"),
        (r"(Conv3d_\w+)/norm", r"\1.BatchNorm_0"),
    ),
    "resnet": (
        (r"stem", r"blocks.0.conv"),
        (r"stem_norm", r"blocks.0.norm"),
        (r"head", r"blocks.6.proj"),
        *_block_rules({1: 1, 2: 3, 3: 4, 4: 5}, (*_BRANCH, (r"norm_b", r"branch2.norm_b"))),
    ),  # blocks.2 is a pool
    # pytorchvideo calls the stem's spatial convolution conv_t and its temporal one conv_xy.
    "x3d": (
        (r"stem_space", r"blocks.0.conv.conv_t"),
        (r"stem_time", r"blocks.0.conv.conv_xy"),
        (r"stem_norm", r"blocks.0.norm"),
        (r"last", r"blocks.5.pool.pre_conv"),
        (r"last_norm", r"blocks.5.pool.pre_norm"),
        (r"project", r"blocks.5.pool.post_conv"),
        (r"head", r"blocks.5.proj"),
        *_block_rules(
            {1: 1, 2: 2, 3: 3, 4: 4},
            (
                *_BRANCH,
                (r"norm_b", r"branch2.norm_b.0"),
                (r"squeeze/down", r"branch2.norm_b.1.block.0"),
                (r"squeeze/up", r"branch2.norm_b.1.block.2"),
            ),
        ),
    ),
}


def names_of(kind: str, shapes: Params, grids: Mapping[str, Grid] | None = None) -> Names:
    """The names of an architecture with these parameter shapes.

    kind: 'c3d', 'i3d', 'resnet', 'x3d', 'yamnet' or one of `transformer_names.KINDS`. grids: of
    position tables, by path.
    """
    flat = tree.flatten(shapes)
    if kind in transformer_names.KINDS:
        return transformer_names.names_of(kind, flat, grids or {})
    if kind == "yamnet":
        return Names(tuple(_yamnet_entry(path, flat) for path in flat), ())
    entries = tuple(_entry(kind, path, flat) for path in flat)
    counters = (
        ()
        if kind == "i3d"
        else tuple(
            e.reference_name.replace("running_mean", "num_batches_tracked")
            for e in entries
            if e.path.endswith("/mean")
        )
    )
    return Names(entries, counters)


def import_params(
    params: Params, arrays: Mapping[str, np.ndarray], names: Names, grid: tuple[int, ...] = ()
) -> tuple[Params, Report]:
    """`params` (arrays or shapes) with every leaf that the arrays have, in float32 or the leaf's
    dtype.

    Ignores a common prefix of names, as added by training states and wrappers; our own dotted names
    work as well. Inflates image kernels to video and resizes position tables (`grid`: their
    original grid, if it is ambiguous). Raises UserError if a shape differs by more than axes of
    length one, if layers are missing from a stack, or if nothing matches.
    """
    report = Report()
    arrays, originals = _translate_dialect(arrays, names)
    prefix, own_names = _prefix(arrays, names)
    leaves, parts, used = tree.flatten(params), {}, set()
    for entry in _own_entries(names) if own_names else names.entries:
        name = prefix + (entry.path.replace("/", ".") if own_names else entry.reference_name)
        if name in arrays:
            if originals and not own_names:
                report.renamed[entry.reference_name] = originals[name]
            part = _fit_array(arrays[name], name, entry, leaves[entry.path], report, grid)
            parts.setdefault(entry.path, {})[entry.layer] = part
            used.add(name)
    if any("inflated" in text for text in report.reshaped):
        report.renamed.clear()  # exported as the video model that it became
    imported = {
        path: _stack_layers(parts_by_layer, leaves[path], path)
        for path, parts_by_layer in parts.items()
    }
    report.missing.extend(
        path
        for path in dict.fromkeys(entry.path for entry in names.entries)
        if path not in imported
    )
    for name in names.counters:
        if prefix + name in arrays and arrays[prefix + name].size == 1:
            report.counters[name] = int(arrays[prefix + name].reshape(()))
            used.add(prefix + name)
    if not imported:
        examples = ", ".join(list(arrays)[:3])
        raise UserError(
            f"none of the {len(arrays)} arrays ({examples}, ...) has a name of this architecture "
            f"({names.entries[0].reference_name}, ...): set config.model to the model of these "
            "weights."
        )
    report.unused.extend(sorted(originals.get(name, name) for name in set(arrays) - used))
    return tree.map_named(lambda path, leaf: imported.get(path, leaf), params), report


def export_params(params: Params, names: Names, report: Report) -> dict[str, np.ndarray]:
    """The parameters with the reference's names, layouts and dtypes, and the counters of the
    report.

    Use `Report()` if they were not imported: float32, and counters of 0.
    """
    leaves, shards = tree.flatten(params), {}
    for entry in names.entries:
        leaf = np.asarray(leaves[entry.path])
        array = entry.layout.to_reference(leaf if entry.layer is None else leaf[entry.layer])
        array = np.asarray(
            array, jnp.dtype(report.cast.get(entry.reference_name, array.dtype)), order="C"
        )
        shards.setdefault(report.renamed.get(entry.reference_name, entry.reference_name), {})[
            entry.part[0]
        ] = array
    exported = {
        name: shards_by_index[0]
        if len(shards_by_index) == 1
        else np.concatenate([shards_by_index[i] for i in range(len(shards_by_index))])
        for name, shards_by_index in shards.items()
    }
    return exported | {
        name: np.array(report.counters.get(name, 0), np.int64) for name in names.counters
    }


def head_classes(arrays: Mapping[str, np.ndarray], names: Names) -> int:
    """Number of classes of the head among the arrays, 0 if there is none."""
    bias = _head_names(arrays, names).get("head/bias")
    return arrays[bias].size if bias in arrays else 0


def without_head(arrays: Mapping[str, np.ndarray], names: Names) -> dict[str, np.ndarray]:
    """The arrays without those of the head."""
    head = set(_head_names(arrays, names).values())
    return {name: array for name, array in arrays.items() if name not in head}


def _head_names(arrays: Mapping[str, np.ndarray], names: Names) -> dict[str, str]:
    """The names that the head's parameters have in a file, by our path."""
    arrays, originals = _translate_dialect(arrays, names)
    prefix, own_names = _prefix(arrays, names)
    found = {
        e.path: prefix + (e.path.replace("/", ".") if own_names else e.reference_name)
        for e in names.entries
        if e.path.startswith("head/")
    }
    return {path: originals.get(name, name) for path, name in found.items()}


def _entry(kind: str, path: str, flat: Mapping[str, Any]) -> Entry:
    module, _, leaf = path.rpartition("/")
    reference_name = next(
        match.expand(template)
        for pattern, template in _RULES[kind]
        if (match := re.fullmatch(pattern, module))
    )
    if kind == "i3d":
        collection = "batch_stats" if leaf in ("mean", "var") else "params"
        return Entry(
            path, f"{collection}.{reference_name}.{leaf}", _POINT if path == "head/kernel" else SAME
        )
    return Entry(path, f"{reference_name}.{_TORCH_LEAVES[leaf]}", _torch_layout(path, flat))


def _yamnet_entry(path: str, flat: Mapping[str, Any]) -> Entry:
    module, _, leaf = path.rpartition("/")
    part = module.rstrip("0123456789")
    block, last = (
        int(module.removeprefix(part) or 0),
        sum(name.endswith("/kernel") for name in flat) - 1,
    )
    name, layout = {
        "mel": ("fc00", DENSE),
        "stem": ("conv01", _IMAGE_TFLITE),
        "depth": (f"dw{2 * block:02}", _DEPTHWISE_TFLITE),
        "point": (f"conv{2 * block + 1:02}", _POINT_TFLITE),
        "head": (f"fc{last:02}", DENSE),
    }[part]
    return Entry(path, f"{name}.w", layout) if leaf == "kernel" else Entry(path, f"{name}.b", SAME)


def _torch_layout(path: str, flat: Mapping[str, Any]) -> Layout:
    dims = len(flat[path].shape)
    if path == "fc6/kernel":
        return _flatten_layout(flat["conv5b/bias"].shape[0], flat[path].shape[0])
    if "/squeeze/" in path and dims == 2:
        return _POINT_TORCH
    return {5: CONV, 2: DENSE}.get(dims, SAME)


def _flatten_layout(channels: int, size: int) -> Layout:
    """C3D's first Dense layer: theirs orders channels before positions, ours after; one frame is
    left there.
    """
    side = round((size // channels) ** 0.5)

    def from_reference(a: np.ndarray) -> np.ndarray:
        return a.reshape(-1, channels, side, side).transpose(2, 3, 1, 0).reshape(size, -1)

    def to_reference(a: np.ndarray) -> np.ndarray:
        return a.reshape(side, side, channels, -1).transpose(3, 2, 0, 1).reshape(-1, size)

    return Layout(from_reference, to_reference)


def _translate_dialect(
    arrays: Mapping[str, np.ndarray], names: Names
) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """The arrays under the reference's names, with the file's own names if it has a dialect: the
    best match.
    """
    reference_names = {e.reference_name for e in names.entries}
    best, best_count = {}, _count_matches(arrays, reference_names)
    for rules in names.dialects:
        renamed = {name: name for name in arrays}
        for pattern, replacement in rules:
            renamed = {name: re.sub(pattern, replacement, new) for name, new in renamed.items()}
        count = _count_matches(renamed.values(), reference_names)
        if count > best_count:
            best, best_count = {new: name for name, new in renamed.items()}, count
    return ({new: arrays[name] for new, name in best.items()} if best else arrays), best


def _count_matches(names: Iterable[str], reference_names: set[str]) -> int:
    return len(reference_names.intersection(names))


def _own_entries(names: Names) -> list[Entry]:
    """Entries for a file with our own names and unsplit stacks."""
    return list(
        {e.path: Entry(e.path, e.reference_name, SAME, grid=e.grid) for e in names.entries}.values()
    )


def _prefix(arrays: Mapping[str, np.ndarray], names: Names) -> tuple[str, bool]:
    """The prefix of the names in a file, and whether they are our own: the best match."""
    best, best_count = ("", False), 0
    for own_names in (False, True):
        known_names = list(
            dict.fromkeys(
                e.path.replace("/", ".") if own_names else e.reference_name for e in names.entries
            )
        )
        candidates = [
            name
            for name in arrays
            for last in (known_names[0], known_names[-1])
            if name.endswith(last)
        ]
        prefixes = {
            "",
            *(
                name.removesuffix(last)
                for name in candidates
                for last in (known_names[0], known_names[-1])
            ),
        }
        for prefix in sorted(prefixes, key=len):
            count = sum(prefix + name in arrays for name in known_names)
            if count > best_count:
                best, best_count = (prefix, own_names), count
    return best


def _stack_layers(layers: Mapping[int | None, np.ndarray], leaf: Any, path: str) -> np.ndarray:
    """Stacks a leaf from its layers. Raises UserError if some are missing."""
    if None in layers:
        return layers[None]
    missing = [i for i in range(leaf.shape[0]) if i not in layers]
    if missing:
        raise UserError(
            f"the weights have {len(layers)} of the {leaf.shape[0]} layers of {path} (none for "
            f"layer {missing[0]}): set config.model to the model of these weights."
        )
    return np.stack([layers[i] for i in range(leaf.shape[0])])


def _fit_array(
    array: np.ndarray, name: str, entry: Entry, leaf: Any, report: Report, grid: tuple[int, ...]
) -> np.ndarray:
    """The array, or our part of it, as our leaf or its layer; updates the report. Raises UserError
    if it does not fit.
    """
    shape = leaf.shape if entry.layer is None else leaf.shape[1:]
    expected = entry.layout.to_reference(np.empty(shape, np.bool_)).shape
    part, num_parts = entry.part
    if num_parts > 1 and array.shape != (num_parts * expected[0], *expected[1:]):
        raise _shape_error(name, array, (num_parts * expected[0], *expected[1:]), entry)
    if array.dtype != leaf.dtype:
        report.cast[entry.reference_name] = array.dtype.name
    if name not in report.matched:
        report.matched.append(name)
    if num_parts > 1:
        array = array[part * expected[0] : (part + 1) * expected[0]]
    if array.shape == expected:
        return np.asarray(entry.layout.from_reference(array), leaf.dtype, order="C")
    resized = _resized(array, entry, shape, grid)
    if resized is not None:
        change = "inflated" if _is_image(array, entry, shape) else "read on another grid"
        report.reshaped.append(f"{name} {array.shape} to {expected}, {change}")
        return resized.astype(leaf.dtype)
    if [n for n in array.shape if n != 1] != [n for n in expected if n != 1]:
        raise _shape_error(name, array, expected, entry)
    report.reshaped.append(f"{name} {array.shape} to {expected}")
    return np.asarray(entry.layout.from_reference(array.reshape(expected)), leaf.dtype, order="C")


def _shape_error(
    name: str, array: np.ndarray, expected: tuple[int, ...], entry: Entry
) -> UserError:
    hint = (
        "set config.num_classes to the number of its classes"
        if entry.path.startswith("head/")
        else ("set config.model to the model of these weights")
    )
    return UserError(
        f"array {name} has shape {array.shape} but the model needs {expected}: {hint}."
    )


def _resized(
    array: np.ndarray, entry: Entry, shape: tuple[int, ...], grid: tuple[int, ...]
) -> np.ndarray | None:
    """An inflated image kernel or a resized position table; None if it is neither."""
    if _is_image(array, entry, shape):
        return resize.inflate(array.transpose(2, 3, 1, 0), shape[0])
    if entry.grid is None or array.shape[-1] != shape[-1] or array.size // shape[-1] == shape[0]:
        return None
    num_leading, new, square = entry.grid
    table = array.reshape(-1, shape[-1]).astype(np.float32)
    old = resize.old_grid(len(table) - num_leading, new, square, grid)
    return np.concatenate(
        [table[:num_leading], resize.resize_positions(table[num_leading:], old, new)]
    )


def _is_image(array: np.ndarray, entry: Entry, shape: tuple[int, ...]) -> bool:
    """Whether it is a kernel [O, I, h, w] and ours has a time axis."""
    return (
        entry.path.endswith("patches/kernel")
        and array.ndim == 4
        and array.shape == tuple(shape[i] for i in (4, 3, 1, 2))
    )
