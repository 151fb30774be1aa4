# SPDX-License-Identifier: Apache-2.0
"""Published weights: reads them as a network's parameters and loads them into a stage's stem."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from particlejax.config.job_specs import ImportSpec
from particlejax.core import csv_table, tree
from particlejax.core.typing import Params, UserError
from particlejax.models import cnn_stem, zoo
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import description, formats, names, packages
from particlejax.models.zoo.convert.config_settings import Keys
from particlejax.models.zoo.convert.description import DEFAULT_MODEL, Description
from particlejax.models.zoo.convert.pretrained_folder import listing
from particlejax.models.zoo.networks import BackboneSpec
from particlejax.train import stage as run
from particlejax.train.log import log_info
from particlejax.train.train_state import TrainState

_AS_PUBLISHED = ImportSpec()
_STEM = Keys("config.model.stem.model", "config.model.stem.weights", may_be_empty=False)
# Kinetics-400's class names in the order of its published label map, which is alphabetical.
_KINETICS = Path(zoo.__file__).with_name("kinetics400.txt")
_LABELS = "label_map.txt"
Imported = tuple[backbones.Backbone, Params, names.Names, names.Report]


class Network(NamedTuple):
    """A network with its parameters on the device; a missing head is zero."""

    backbone: backbones.Backbone
    params: Params
    has_head: bool


def load_network(
    model: str,
    weights: str,
    check: Callable[[BackboneSpec], None],
    keys: Keys = Keys(),  # noqa: B008 (immutable)
) -> Network:
    """A network for predictions or features: of `weights`, or with '' of an installed package.

    model: a published network; '': what the weights say, else I3D. weights: also 'random'. check:
    raises UserError for a network of no use here, before its weights are read. Raises UserError for
    weights that are not there, do not fit, or lack more than a head.
    """
    description.check_model(model)
    if model in backbones.VARIANTS:
        check(backbones.find_backbone(model))
    if weights == "random":
        spec = backbones.find_backbone(model or DEFAULT_MODEL)
        check(spec)
        backbone = backbones.build_backbone(spec)
        return Network(backbone, jax.jit(backbone.init)(jax.random.key(0)), True)
    path = weights or str(packages.find_weights(model or DEFAULT_MODEL, "weights"))
    found = description.describe(path)
    spec = description.network_of(found, model, keys, DEFAULT_MODEL)
    check(spec)
    backbone, params, _, report = _load(path, found, spec, _AS_PUBLISHED)
    missing = description.without_head(report.missing)
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} parameters of {spec.name} ({listing(missing)}, ...): set "
            f"{keys.model} to the model of these weights, or use other {keys.weights}."
        )
    params = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, np.ndarray) else np.zeros(leaf.shape, leaf.dtype),
        params,
    )
    return Network(backbone, jax.device_put(params), not report.missing)


def load_pretrained(
    source: str, model: str = "", spec: ImportSpec = _AS_PUBLISHED, whole: bool = False
) -> Imported:
    """A backbone with the parameters from a file or folder; missing ones are left as shapes.

    model: a published network; '': what the weights say. spec: num_classes, sizes and grid; unset
    values are as published. whole: of pretraining weights all that trains, not the encoder alone.
    Raises UserError if the weights do not fit.
    """
    description.check_model(model)
    found = description.describe(source)
    network = description.network_of(found, model, Keys(), whole=whole)
    return _load(source, found, network, spec)


def _load(source: str, found: Description, published: BackboneSpec, spec: ImportSpec) -> Imported:
    arrays = formats.read(source)
    backbone = backbones.build_backbone(
        published, spec.num_classes, spec.num_frames, spec.image_size
    )
    shapes = backbones.parameter_shapes(backbone)
    name_map = names.names_of(published.kind, shapes, backbones.position_grids(backbone))
    stored_classes = names.head_classes(arrays, name_map)
    _check_class_names(source, found, published, stored_classes)
    classes = spec.num_classes or stored_classes
    if classes != getattr(backbone.spec.net, "classes", 0):
        backbone = backbones.build_backbone(published, classes, spec.num_frames, spec.image_size)
        shapes = backbones.parameter_shapes(backbone)
    if not found.is_empty and stored_classes not in (0, classes):
        arrays = names.without_head(arrays, name_map)
        log_info(
            f"{source}: a new head for {classes} classes, randomly initialized, instead of that of "
            f"the weights for {stored_classes}"
        )
    grid = spec.source_grid or description.grid_of(found, published)
    try:
        params, report = names.import_params(shapes, arrays, name_map, grid)
    except UserError as error:
        if not found.config or found.kept:
            raise
        problem, _, _ = str(error).rpartition(": ")  # whose remedy is another model
        raise UserError(
            f"the weights in {source} do not fit {found.file} ({problem}): fetch both again, from "
            "one place."
        ) from error
    report.cast.update(found.kept.get("cast", {}))
    report.counters.update(found.kept.get("counters", {}))
    report.renamed.update(found.kept.get("renamed", {}))
    # of an import: what it drew at random
    drawn = found.kept.get("missing", ())
    report.missing.extend(name for name in drawn if name not in report.missing)
    _report_differences(source, found, backbone.spec, report)
    if len(backbone.spec.class_names) != classes:
        backbone = backbone._replace(spec=replace(backbone.spec, class_names=()))
    return backbone, params, name_map, report


def _check_class_names(
    source: str, found: Description, spec: BackboneSpec, stored_classes: int
) -> None:
    """Raises UserError if a config.json has another number of class names than the head has
    classes.
    """
    count = len(spec.class_names)
    if found.config and not found.kept and count and stored_classes not in (0, count):
        raise UserError(
            f"{found.file} names {count} classes but the head in {source} has {stored_classes}: "
            "fetch both again, from one place."
        )


def _report_differences(
    source: str, found: Description, spec: BackboneSpec, report: names.Report
) -> None:
    """Logs what the weights lack and what is not used of them. Raises UserError for more than is
    known to be harmless in a folder that describes itself.
    """
    known, unused = description.left_out(spec.kind, report.unused)
    missing = description.without_head(report.missing)
    head = [name for name in report.missing if name not in missing]
    if len({"head/kernel", "head/bias"}.intersection(head)) == 1:  # half a head is none
        missing, head = report.missing, []
    if found.strict and (missing or unused):
        problems = [
            f"{len(found_names)} {text} ({listing(found_names)})"
            for text, found_names in (
                (f"parameters of {spec.name} are not in them", missing),
                ("arrays have no use", unused),
            )
            if found_names
        ]
        remedy = f", or name {formats.located(source)} itself to leave them out" * (not missing)
        raise UserError(
            f"the weights in {source} do not fit their config.json, {' and '.join(problems)}: "
            f"fetch the folder again{remedy}."
        )
    for reason, left_out in known.items():
        log_info(f"{source}: {len(left_out)} arrays left out, {reason}")
    if unused:
        log_info(f"{source}: {len(unused)} arrays are not used ({listing(unused)})")
    if head:
        log_info(f"{source}: the head is not in it ({listing(head)}), its features are")


def class_names(
    network: Network, weights: str, file: str = "", key: str = "config.class_names"
) -> tuple[str, ...]:
    """Names of the classes of a network's head: of `file` with a name a line, of its weights, of
    the file beside them, of Kinetics-400 if the number fits, or else numbers.

    () without a head. Raises UserError if `file` does not exist or has another number of names.
    """
    spec = network.backbone.spec
    num_classes = getattr(spec.net, "classes", 0) if network.has_head else 0
    if not num_classes or (spec.class_names and not file):
        return spec.class_names if num_classes else ()
    path = Path(file).expanduser() if file else _label_map(weights)
    if not path.is_file():
        raise UserError(f"{path} does not exist: check {key}, a file with a name a line.")
    found = csv_table.read_names(path)
    if len(found) == num_classes:
        return found
    if file:
        raise UserError(
            f"{path} has {len(found)} names but the model has {num_classes} classes: use its label "
            "map."
        )
    return tuple(f"class {i}" for i in range(num_classes))


def names_beside(backbone: backbones.Backbone, weights: str) -> tuple[str, ...]:
    """Names of the classes that weights have, or the file beside them; () if none fits."""
    spec = backbone.spec
    if spec.class_names or not (path := _label_map(weights)).is_file() or path == _KINETICS:
        return spec.class_names
    found = csv_table.read_names(path)
    return found if len(found) == getattr(spec.net, "classes", 0) else ()


def _label_map(weights: str) -> Path:
    """The label map in the folder of the weights or beside them, else Kinetics-400's."""
    path = Path(weights).expanduser()
    if weights and weights != "random":
        for folder in ([path] if path.is_dir() else []) + [path.parent]:
            if (folder / _LABELS).is_file():
                return folder / _LABELS
    return _KINETICS


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
    found = description.describe(path)
    _, params, _, _ = _load(
        path, found, description.network_of(found, spec.model, _STEM), _AS_PUBLISHED
    )
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
