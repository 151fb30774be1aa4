# SPDX-License-Identifier: Apache-2.0
"""Converts published weights to a checkpoint, with a report of matched arrays, and exports them
back.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from particlejax.config.job_specs import ImportSpec
from particlejax.core import io, tree
from particlejax.core.typing import Params, UserError
from particlejax.distributed import checkpoint
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import description, formats, names, packages
from particlejax.models.zoo.vit_blocks import StackSize
from particlejax.reports.markdown import table
from particlejax.train import pretrained, stage
from particlejax.train.log import log_info

STAGE = "import"  # of the checkpoint
_MAX_LINES = 30  # names listed in the report


def import_weights(spec: ImportSpec, workdir: Path, name: str) -> None:
    """Job 'import_weights': loads `config.weights` into `config.model`; exports to
    `config.export_path` if it is set.
    """
    del name
    if not spec.model and not spec.weights:
        raise UserError(
            "config.weights or config.model is empty: add --config.weights=PATH, and "
            "--config.model=NAME unless a config.json beside the weights says what they are."
        )
    spec = dataclasses.replace(
        spec, weights=spec.weights or str(packages.find_weights(spec.model, "weights"))
    )
    backbone, params, name_map, report = pretrained.load_pretrained(
        spec.weights, spec.model, spec, whole=True
    )
    found = description.describe(spec.weights)
    network = backbone.spec
    if report.missing:
        params = _fill_missing(backbone, params, spec.seed)
    num_classes = getattr(network.net, "classes", 0)
    class_names = pretrained.names_beside(backbone, spec.weights)
    if class_names != network.class_names:
        backbone = backbone._replace(spec=dataclasses.replace(network, class_names=class_names))
    checkpoints = checkpoint.Checkpoints(stage.checkpoint_folder(workdir, STAGE), 2)
    checkpoints.save(
        0,
        {"params": params},
        {
            "model": network.name,
            "cast": report.cast,
            "counters": report.counters,
            "renamed": report.renamed,
            **description.to_keep(found, backbone.spec, report.missing),
        },
    )
    checkpoints.close()
    if spec.export_path:
        formats.write(spec.export_path, names.export_params(params, name_map, report))
        log_info(f"exported under the reference's names: {spec.export_path}")
    summary = {
        "weights": spec.weights,
        "model": network.name,
        "num_classes": num_classes,
        "class_names": list(class_names),
        "num_params": tree.count(params),
        "matched": len(report.matched),
        "missing": report.missing,
        "unused": report.unused,
        "reshaped": report.reshaped,
        "cast": report.cast,
    }
    stage.add_results(workdir, STAGE, summary, {})
    path = workdir / "report.md"
    io.write_text(path, "\n".join(_report(spec, backbone, summary)))
    log_info(_summary(report))
    log_info(f"report: {path}")


def _fill_missing(backbone: backbones.Backbone, params: Params, seed: int) -> Params:
    flat = tree.flatten(params)
    missing = [name for name, leaf in flat.items() if not isinstance(leaf, np.ndarray)]

    @jax.jit
    def draw(key: jax.Array) -> dict[str, jax.Array]:  # XLA leaves out what nobody reads
        drawn = tree.flatten(backbone.init(key))
        return {name: drawn[name] for name in missing}

    random_params = jax.tree.map(np.asarray, draw(jax.random.key(seed % 2**32)))
    return tree.map_named(lambda name, leaf: random_params.get(name, leaf), params)


def _summary(report: names.Report) -> str:
    text = (
        f"{len(report.matched)} arrays matched, {len(report.missing)} missing, "
        f"{len(report.unused)} unused"
    )
    return text + (
        "; missing ones are randomly initialized, also in an export" if report.missing else ""
    )


def _report(
    spec: ImportSpec, backbone: backbones.Backbone, summary: Mapping[str, Any]
) -> Iterator[str]:
    name = backbone.spec.name
    yield from (f"# {name} from {Path(spec.weights).name}", "")
    yield from table(
        ["", ""],
        [
            [
                "model",
                (
                    f"{name}, {summary['num_classes'] or 'no'} classes, input "
                    f"{_describe_inputs(backbone)}"
                ),
            ],
            *(
                [["classes", ", ".join(summary["class_names"][:_MAX_LINES])]]
                if summary["class_names"]
                else []
            ),
            *_sizes(backbone),
            ["parameters", f"{summary['num_params']:,}"],
            ["arrays matched", summary["matched"]],
            ["cast to float32", len(summary["cast"])],
        ],
    )
    yield ""
    for key, meaning in (
        ("missing", "parameters that are not in the weights; randomly initialized"),
        ("unused", "arrays of the weights that the model does not have"),
        (
            "reshaped",
            "arrays with axes of length one added or removed, or interpolated to another size",
        ),
    ):
        names = summary[key]
        yield from (f"## {len(names)} {key}: {meaning}", "")
        yield from (f"- `{name}`" for name in names[:_MAX_LINES])
        if len(names) > _MAX_LINES:
            yield f"- and {len(names) - _MAX_LINES} others, in [results.json](results.json)"
        yield ""
    yield (
        f"The checkpoint is in `checkpoints/{STAGE}`. This folder can be named wherever weights "
        "are asked for: `--config.weights`, `--config.model.stem.weights` and `pj.load_backbone`."
    )


def _sizes(backbone: backbones.Backbone) -> list[list[str]]:
    """A Transformer's sizes and pixel normalization, as rows of the report."""
    spec, size = backbone.spec, getattr(backbone.spec.net, "size", None)
    if not isinstance(size, StackSize):
        return []
    rows = [
        ["sizes", f"width {size.width}, depth {size.depth}, {size.heads} heads, MLP {size.mlp}"]
    ]
    if spec.video:
        scaled = f", short side {spec.short_side} before the crop" if spec.short_side else ""
        rows.append(["pixels", f"mean {spec.mean}, deviation {spec.std}{scaled}"])
    return rows


def _describe_inputs(backbone: backbones.Backbone) -> str:
    """The network's input shapes and dtypes, as text."""
    return " and ".join(
        f"{' x '.join(map(str, shape))} {dtype}" for shape, dtype in backbone.spec.examples
    )
