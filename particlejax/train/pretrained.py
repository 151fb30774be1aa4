# SPDX-License-Identifier: Apache-2.0
"""Published weights: reads them as a network's parameters and loads them into a stage's stem."""

from dataclasses import replace

import jax
import numpy as np

from particlejax.config.job_specs import ImportSpec
from particlejax.core import tree
from particlejax.core.typing import Params, UserError
from particlejax.models import cnn_stem
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import formats, names, packages
from particlejax.train import stage as run
from particlejax.train.log import log_info
from particlejax.train.train_state import TrainState

_AS_PUBLISHED = ImportSpec()


def load_pretrained(
    source: str, model: str, spec: ImportSpec = _AS_PUBLISHED
) -> tuple[backbones.Backbone, Params, names.Names, names.Report]:
    """A backbone with the parameters from a file or folder; missing ones are left as shapes.

    spec: num_classes, sizes and grid; unset values are as published. Raises UserError if the
    weights do not fit.
    """
    published = backbones.find_backbone(model)
    arrays = formats.read(source)
    backbone = backbones.build_backbone(
        published, spec.num_classes, spec.num_frames, spec.image_size
    )
    shapes = backbones.parameter_shapes(backbone)
    name_map = names.names_of(published.kind, shapes, backbones.position_grids(backbone))
    classes = spec.num_classes or names.head_classes(arrays, name_map)
    if classes != getattr(backbone.spec.net, "classes", 0):
        backbone = backbones.build_backbone(published, classes, spec.num_frames, spec.image_size)
        shapes = backbones.parameter_shapes(backbone)
    params, report = names.import_params(shapes, arrays, name_map, spec.source_grid)
    metadata = formats.saved_metadata(source)
    report.cast.update(metadata.get("cast", {}))
    report.counters.update(metadata.get("counters", {}))
    report.renamed.update(metadata.get("renamed", {}))
    return backbone, params, name_map, report


def with_stem_weights(state: TrainState, stage: run.Stage) -> TrainState:
    """The initial state of a stage, with published weights in its stem unless they are random.

    Raises UserError if the weights are not found, are incomplete, or expect another normalization.
    """
    spec = stage.experiment.model_of(stage.spec).stem
    if not spec.model or spec.weights == "random":
        return state
    published = backbones.find_backbone(spec.model)
    run_stats, published_stats = (
        (stage.data.image_mean, stage.data.image_std, stage.data.temporal_mean_scale),
        (published.mean, published.std, 1.0),
    )
    if run_stats != published_stats:
        raise UserError(
            f"the weights of {spec.model} need config.data.image_mean, image_std and "
            f"temporal_mean_scale = {published_stats}, but they are {run_stats}: set these values, "
            "or config.model.stem.weights='random'."
        )
    path = spec.weights or str(packages.find_weights(spec.model, "model.stem.weights"))
    _, params, _, _ = load_pretrained(path, spec.model)
    flat = {
        cnn_stem.PATH + name: leaf
        for name, leaf in tree.flatten(params).items()
        if isinstance(leaf, np.ndarray)
    }
    stem_names = [name for name in tree.flatten(state.params) if name.startswith(cnn_stem.PATH)]
    missing = [name for name in stem_names if name not in flat]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} parameters of {spec.model} "
            f"({missing[0].removeprefix(cnn_stem.PATH)}, ...): set config.model.stem.model to "
            "the model of these weights, or give other weights."
        )
    params = tree.map_named(
        lambda name, leaf: (
            jax.device_put(flat[name], leaf.sharding) if name in stem_names else leaf
        ),
        state.params,
    )
    log_info(f"{stage.name}: loaded {len(stem_names)} arrays of {spec.model} from {path}")
    return replace(
        state,
        params=params,
        average=jax.tree.map(lambda x: x.copy(), params) if stage.spec.ema_decay else (),
    )
