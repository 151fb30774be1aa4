# SPDX-License-Identifier: Apache-2.0
"""Published weights become a checkpoint of ours, with a report of what was matched; and go back under their names."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from particlejax import checkpoint, tree
from particlejax.adapt import formats, names
from particlejax.apps.report import table
from particlejax.jobspec import ImportSpec
from particlejax.models import backbones
from particlejax.train import run
from particlejax.train.log import say
from particlejax.typing import Params, UserError

STAGE = "import"  # of the checkpoint
_MOST = 30  # names of a list in the report


def import_weights(spec: ImportSpec, workdir: Path, name: str) -> None:
    """Job 'import_weights': `config.source` into `config.model`, and out to `config.export` where that is named."""
    del name
    if not spec.source or not spec.model:
        raise UserError("config.source or config.model is empty: add --config.source=PATH --config.model=NAME.")
    backbone, params, known, report = read(spec.source, spec.model, spec.classes)
    if report.missing:
        params = _filled(backbone, params, spec.seed)
    classes = tree.flatten(params)["head/bias"].size
    saved = checkpoint.Checkpoints(run.checkpoint_folder(workdir, STAGE), 2)
    saved.save(0, {"params": params}, {"model": spec.model, "cast": report.cast, "counters": report.counters})
    saved.close()
    if spec.export:
        formats.write(spec.export, names.export_params(params, known, report))
        say(f"exported under the reference's names: {spec.export}")
    figures = {"source": spec.source, "model": spec.model, "classes": classes, "parameters": tree.count(params),
               "matched": len(report.matched), "missing": report.missing, "unused": report.unused,
               "reshaped": report.reshaped, "cast": report.cast}
    run.add_results(workdir, STAGE, figures, {})
    path = workdir / "report.md"
    path.write_text("\n".join(_lines(spec, backbone, figures)), encoding="utf-8")
    say(_sentence(report))
    say(f"report: {path}")


def read(source: str, model: str, classes: int = 0
         ) -> tuple[backbones.Backbone, Params, names.Names, names.Report]:
    """A backbone with the parameters of a file or folder; those that it does not have are only their shapes.

    classes: of the head, 0 for as many as the weights have. Raises UserError where the weights do not fit the model.
    """
    spec = backbones.find(model)
    arrays = formats.read(source)
    known = names.names_of(spec.kind, backbones.parameter_shapes(backbones.build(spec)))
    backbone = backbones.build(spec, classes or names.head_classes(arrays, known))
    params, report = names.import_params(backbones.parameter_shapes(backbone), arrays, known)
    before = formats.said_beside(source)
    report.cast.update(before.get("cast", {}))
    report.counters.update(before.get("counters", {}))
    return backbone, params, known, report


def _filled(backbone: backbones.Backbone, params: Params, seed: int) -> Params:
    fresh = jax.jit(backbone.init)(jax.random.key(seed))
    return jax.tree.map(lambda ours, new: ours if isinstance(ours, np.ndarray) else np.asarray(new), params, fresh)


def _sentence(report: names.Report) -> str:
    text = f"{len(report.matched)} arrays matched, {len(report.missing)} missing, {len(report.unused)} unused"
    return text + ("; the missing ones are random, in an export as well" if report.missing else "")


def _lines(spec: ImportSpec, backbone: backbones.Backbone, figures: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"# {spec.model} from {Path(spec.source).name}", "")
    yield from table(["", ""], [
        ["model", f"{spec.model}, {figures['classes']} classes, clips of {backbone.spec.frames} frames, "
                  f"{backbone.spec.size} x {backbone.spec.size}"],
        ["numbers", f"{figures['parameters']:,}"], ["arrays matched", figures["matched"]],
        ["of another type, turned to float32", len(figures["cast"])]])
    yield ""
    for key, meaning in (("missing", "our parameters that the weights do not have; they are random"),
                         ("unused", "arrays of the weights that this model has no place for"),
                         ("reshaped", "arrays of which axes of length one were added or dropped")):
        found = figures[key]
        yield from (f"## {len(found)} {key}: {meaning}", "")
        yield from (f"- `{name}`" for name in found[:_MOST])
        if len(found) > _MOST:
            yield f"- and {len(found) - _MOST} others, in [results.json](results.json)"
        yield ""
    yield f"The checkpoint is in `checkpoints/{STAGE}`; `--config.weights` and `--config.source` take this folder."
