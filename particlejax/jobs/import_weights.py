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

from particlejax.config.jobs import ImportSpec
from particlejax.core import io, tree
from particlejax.core.typing import Params, UserError
from particlejax.distributed import checkpoint
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import formats, names, packages
from particlejax.reports.markdown import table
from particlejax.train import pretrained, stage
from particlejax.train.log import say

STAGE = "import"  # of the checkpoint
_MOST = 30  # names listed in the report


def import_weights(spec: ImportSpec, workdir: Path, name: str) -> None:
    """Job 'import_weights': loads `config.weights` into `config.model`; exports to
    `config.export_path` if it is set.
    """
    del name
    if not spec.model:
        raise UserError(
            "config.weights or config.model is empty: add --config.weights=PATH "
            "--config.model=NAME."
        )
    spec = dataclasses.replace(
        spec, weights=spec.weights or str(packages.find(spec.model, "weights"))
    )
    backbone, params, known, report = pretrained.read(spec.weights, spec.model, spec)
    if report.missing:
        params = _filled(backbone, params, spec.seed)
    classes = getattr(backbone.spec.net, "classes", 0)
    saved = checkpoint.Checkpoints(stage.checkpoint_folder(workdir, STAGE), 2)
    saved.save(
        0,
        {"params": params},
        {
            "model": spec.model,
            "cast": report.cast,
            "counters": report.counters,
            "renamed": report.renamed,
        },
    )
    saved.close()
    if spec.export_path:
        formats.write(spec.export_path, names.export_params(params, known, report))
        say(f"exported under the reference's names: {spec.export_path}")
    figures = {
        "weights": spec.weights,
        "model": spec.model,
        "num_classes": classes,
        "num_params": tree.count(params),
        "matched": len(report.matched),
        "missing": report.missing,
        "unused": report.unused,
        "reshaped": report.reshaped,
        "cast": report.cast,
    }
    stage.add_results(workdir, STAGE, figures, {})
    path = workdir / "report.md"
    io.write_text(path, "\n".join(_lines(spec, backbone, figures)))
    say(_sentence(report))
    say(f"report: {path}")


def _filled(backbone: backbones.Backbone, params: Params, seed: int) -> Params:
    fresh = jax.jit(backbone.init)(jax.random.key(seed))
    return jax.tree.map(
        lambda ours, new: ours if isinstance(ours, np.ndarray) else np.asarray(new), params, fresh
    )


def _sentence(report: names.Report) -> str:
    text = (
        f"{len(report.matched)} arrays matched, {len(report.missing)} missing, "
        f"{len(report.unused)} unused"
    )
    return text + (
        "; missing ones are randomly initialized, also in an export" if report.missing else ""
    )


def _lines(
    spec: ImportSpec, backbone: backbones.Backbone, figures: Mapping[str, Any]
) -> Iterator[str]:
    yield from (f"# {spec.model} from {Path(spec.weights).name}", "")
    yield from table(
        ["", ""],
        [
            [
                "model",
                f"{spec.model}, {figures['num_classes'] or 'no'} classes, input {_taken(backbone)}",
            ],
            ["parameters", f"{figures['num_params']:,}"],
            ["arrays matched", figures["matched"]],
            ["cast to float32", len(figures["cast"])],
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
        found = figures[key]
        yield from (f"## {len(found)} {key}: {meaning}", "")
        yield from (f"- `{name}`" for name in found[:_MOST])
        if len(found) > _MOST:
            yield f"- and {len(found) - _MOST} others, in [results.json](results.json)"
        yield ""
    yield (f"The checkpoint is in `checkpoints/{STAGE}`; `--config.weights` accepts this folder.")


def _taken(backbone: backbones.Backbone) -> str:
    """The network's input shapes and dtypes, as text."""
    return " and ".join(
        f"{' x '.join(map(str, shape))} {dtype}" for shape, dtype in backbone.spec.examples
    )
