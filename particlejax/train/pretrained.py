# SPDX-License-Identifier: Apache-2.0
"""Published weights: reads them as a network's parameters and loads them into a stage's stem."""

from dataclasses import replace

import jax
import numpy as np

from particlejax.config.jobs import ImportSpec
from particlejax.core import tree
from particlejax.core.typing import Params, UserError
from particlejax.models import cnn_stem
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import formats, names, packages
from particlejax.train import stage as run
from particlejax.train.log import say
from particlejax.train.train_state import TrainState

_AS_PUBLISHED = ImportSpec()


def read(
    source: str, model: str, spec: ImportSpec = _AS_PUBLISHED
) -> tuple[backbones.Backbone, Params, names.Names, names.Report]:
    """A backbone with the parameters from a file or folder; missing ones are left as shapes.

    spec: num_classes, sizes and grid; unset values are as published. Raises UserError if the
    weights do not fit.
    """
    found = backbones.find(model)
    arrays = formats.read(source)
    backbone = backbones.build(found, spec.num_classes, spec.num_frames, spec.image_size)
    shapes = backbones.parameter_shapes(backbone)
    known = names.names_of(found.kind, shapes, backbones.grids(backbone))
    classes = spec.num_classes or names.head_classes(arrays, known)
    if classes != getattr(backbone.spec.net, "classes", 0):
        backbone = backbones.build(found, classes, spec.num_frames, spec.image_size)
        shapes = backbones.parameter_shapes(backbone)
    params, report = names.import_params(shapes, arrays, known, spec.source_grid)
    before = formats.said_beside(source)
    report.cast.update(before.get("cast", {}))
    report.counters.update(before.get("counters", {}))
    report.renamed.update(before.get("renamed", {}))
    return backbone, params, known, report


def begun(state: TrainState, stage: run.Stage) -> TrainState:
    """The initial state of a stage, with published weights in its stem unless they are random.

    Raises UserError if the weights are not found, are incomplete, or expect another normalization.
    """
    spec = stage.experiment.model_of(stage.spec).stem
    if not spec.model or spec.weights == "random":
        return state
    found = backbones.find(spec.model)
    ours, theirs = (
        (stage.data.image_mean, stage.data.image_std, stage.data.temporal_mean_scale),
        (found.mean, found.std, 1.0),
    )
    if ours != theirs:
        raise UserError(
            f"the weights of {spec.model} need config.data.image_mean, image_std and "
            f"temporal_mean_scale = {theirs}, but they are {ours}: set these values, or "
            "config.model.stem.weights='random'."
        )
    path = spec.weights or str(packages.find(spec.model, "model.stem.weights"))
    _, params, _, _ = read(path, spec.model)
    flat = {
        cnn_stem.PATH + name: leaf
        for name, leaf in tree.flatten(params).items()
        if isinstance(leaf, np.ndarray)
    }
    own = [name for name in tree.flatten(state.params) if name.startswith(cnn_stem.PATH)]
    lacking = [name for name in own if name not in flat]
    if lacking:
        raise UserError(
            f"{path} lacks {len(lacking)} parameters of {spec.model} "
            f"({lacking[0].removeprefix(cnn_stem.PATH)}, ...): set config.model.stem.model to "
            "the model of these weights, or give other weights."
        )
    params = tree.map_named(
        lambda name, leaf: jax.device_put(flat[name], leaf.sharding) if name in own else leaf,
        state.params,
    )
    say(f"{stage.name}: loaded {len(own)} arrays of {spec.model} from {path}")
    return replace(
        state,
        params=params,
        average=jax.tree.map(lambda x: x.copy(), params) if stage.spec.ema_decay else (),
    )
