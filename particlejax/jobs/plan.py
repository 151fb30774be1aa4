# SPDX-License-Identifier: Apache-2.0
"""Plans an experiment's train step on a mesh from its compiled program: memory, collectives and
step time, for TPUs that are not present (`libtpu` package) or for local devices.

Memory and collectives are the compiler's; times are estimates. Figures are per device unless stated
otherwise.
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from particlejax.config.experiment import Experiment, MeshSpec
from particlejax.config.jobs import PlanSpec
from particlejax.core import accelerators, flops, hlo_cost, io
from particlejax.core.errors import UserError, install_line
from particlejax.data import pipeline, sources
from particlejax.distributed import sharding
from particlejax.jobs import config_files
from particlejax.objectives import registry
from particlejax.particles.types import Batch
from particlejax.reports.markdown import table
from particlejax.train import stage as run
from particlejax.train import train_step
from particlejax.train.log import say
from particlejax.train.train_state import TrainState, described, jit_step

HERE = "here"
_STEPS = 1000  # for a stage with num_epochs: only constants of its schedule depend on this
_SPLIT = 8  # fsdp devices of the mesh with data and fsdp
_TENSOR = 4  # tensor devices of the mesh with tensor parallelism
_OVER = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Prepared:
    """A stage as the devices run it, its batch size in rows, and its FLOPs over all devices."""

    stage: run.Stage
    goal: Any  # targets of the labels
    rows: int
    operations: int


def plan(spec: PlanSpec, workdir: Path, name: str) -> None:
    """Job 'plan': each topology with each mesh; writes results.json and report.md. Raises UserError
    if a topology is unavailable.
    """
    del name
    found: dict[str, dict[str, Any]] = {}
    for topology in topologies(spec):
        devices = devices_of(topology)
        chip = accelerators.of(devices[0], len(devices))
        prepared = prepare(spec, devices)
        stage = prepared.stage
        for mesh_spec in spec.meshes or candidates(len(devices)):
            mesh = sharding.make_mesh(mesh_spec, devices)
            label = f"{topology} {title(mesh)}"
            begun = time.monotonic()
            found[label] = figures(prepared, mesh, chip)
            found[label]["seconds_to_compile"] = round(time.monotonic() - begun, 1)
            say(f"{label}: {_sentence(found[label])}")
            # after each mesh, as one may take minutes
            io.write_json(workdir / run.RESULTS, {stage.name: found, "best": best(found)})
    path = workdir / "report.md"
    io.write_text(path, "\n".join(_lines(spec, stage, found)) + "\n")
    print(path.read_text(encoding="utf-8"))
    say(f"report: {path}")


def prepare(spec: PlanSpec, devices: Sequence[jax.Device]) -> Prepared:
    """The stage for these devices. FLOPs are of plain attention: fused kernels recompute some."""
    plain, goal = stage_of(spec, "xla")
    rows = spec.per_device_batch_size * len(devices) or plain.spec.batch_size
    alone = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), sharding.AXES)
    operations = flops.count(_traced(plain, goal, rows, alone)[0].jaxpr)
    stage, _ = stage_of(spec, "auto")
    return Prepared(stage, goal, rows, operations)


def stage_of(spec: PlanSpec, attention: str) -> tuple[run.Stage, Any]:
    """The stage with its targets; the source is opened only if it defines the classes.

    attention: replaces config.model.attention_impl='auto'.
    """
    if not spec.experiment:
        raise UserError(
            "config.experiment is empty: set the file to plan with "
            "--config.experiment=experiments/NAME.py."
        )
    config = config_files.load(spec.experiment)
    config_files.change(config, spec.overrides)
    experiment = Experiment.of(config.to_dict())
    if experiment.model.attention_impl == "auto":
        experiment = replace(experiment, model=replace(experiment.model, attention_impl=attention))
    name = spec.stage or next(iter(experiment.stages), "")
    if name not in experiment.stages:
        known = ", ".join(experiment.stages) or "none"
        raise UserError(
            f"config.stage={spec.stage!r} is not a stage of {spec.experiment}: it has {known}."
        )
    chosen = experiment.stages[name]
    if not registry.classifies(chosen.objectives):
        stage = run.build(experiment, name, ())
        return stage, stage.targets
    data = experiment.data_of(chosen)
    source = sources.open_source(data.source, data.split, data.cache_dir)
    stage = run.build(experiment, name, source.classes)
    return stage, run.weighted(stage, source)


def topologies(spec: PlanSpec) -> list[str]:
    """The topologies of config.topology."""
    return [each.strip() for each in spec.topology.split(",")]


def devices_of(topology: str) -> Sequence[jax.Device]:
    """Local devices for 'here', the first N for 'here:N', else those of a TPU topology. Raises
    UserError if they are unavailable.
    """
    place, _, number = topology.partition(":")
    if place == HERE:
        devices = jax.devices()
        if number and not (number.isdigit() and 0 < int(number) <= len(devices)):
            raise UserError(
                f"config.topology={topology!r}: use 1 to {len(devices)} local devices, such as "
                f"{HERE}:1."
            )
        return devices[: int(number)] if number else devices
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"config.topology={topology!r} needs the TPU compiler: run "
            f"`{install_line('plan')}`, or plan for {HERE!r}."
        )
    # else libtpu queries the cloud's metadata server
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # else only one process may load libtpu; no chip is used here
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")  # else jax searches for a TPU
    # no local device could load a cached program
    jax.config.update("jax_enable_compilation_cache", False)
    from jax.experimental import topologies  # its TPU part needs libtpu

    # default: at least four chips a host
    alone = {} if set(number.split("x")) - {"1"} else {"chips_per_host_bounds": [1, 1, 1]}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"config.topology={topology!r} is not a TPU topology: write it as v5e:16x16, "
            "v5p:4x4x4 or v6e:16x16."
        ) from error


def candidates(devices: int) -> list[MeshSpec]:
    """Meshes to compare: data, fsdp, both, and fsdp with tensor parallelism."""
    found = [MeshSpec(), MeshSpec(data=1, fsdp=-1)]
    if devices > _SPLIT and devices % _SPLIT == 0:
        found.append(MeshSpec(fsdp=_SPLIT))
    if devices > _TENSOR and devices % _TENSOR == 0:
        found.append(MeshSpec(data=1, fsdp=-1, tensor=_TENSOR))
    return found if devices > 1 else found[:1]


def figures(prepared: Prepared, mesh: Mesh, chip: accelerators.Chip | None) -> dict[str, Any]:
    """The figures of the step on a mesh; parameters and batch are abstract shapes."""
    spec, stage = prepared.stage.spec, prepared.stage
    sharding.check_rows(
        prepared.rows // spec.grad_accum_steps,
        mesh,
        f"config.stages.{stage.name}.batch_size / grad_accum_steps",
    )
    traced, state = _traced(stage, prepared.goal, prepared.rows, mesh)
    clips = prepared.rows * stage.data.clips_per_row
    known = {
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "devices": mesh.size,
        "kind": mesh.devices.flat[0].device_kind,
        "clips_per_step": clips,
        "num_params": sum(x.size for x in jax.tree.leaves((state.params, state.frozen))),
        "bytes": {
            "parameters": _held((state.params, state.frozen, state.average)),
            "optimizer": _held(state.opt_state),
        },
        "flops": prepared.operations / mesh.size,
        "memory": chip.memory if chip else 0.0,
    }
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        over = _OVER.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not over:
            raise
        wanted, room = float(over[1]) * _UNITS[over[2]], float(over[3]) * _UNITS[over[4]]
        return known | {"fits": False, "bytes": known["bytes"] | {"all": wanted}, "memory": room}
    return known | _measured(compiled, known, mesh, chip)


def _traced(
    stage: run.Stage, goal: Any, rows: int, mesh: Mesh
) -> tuple[jax.stages.Traced, TrainState]:
    spec = stage.spec
    made = train_step.of(stage, goal, spec.num_steps or _STEPS)
    state = described(
        stage.model, made.optimizer, stage.example, spec.ema_decay, mesh, spec.finetune
    )
    return jit_step(made.step, state, mesh).trace(state, batch_of(stage, rows)), state


def batch_of(stage: run.Stage, rows: int) -> Batch:
    """Abstract shapes of the data's batches."""
    row = pipeline.example(
        pipeline.row_of(stage.data, stage.particles, stage.spec.scale_schedule), 1
    )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), row)


def _held(part: Any) -> int:
    """Bytes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(part)
    )


def _measured(
    compiled: jax.stages.Compiled, known: dict[str, Any], mesh: Mesh, chip: accelerators.Chip | None
) -> dict[str, Any]:
    memory, cost = compiled.memory_analysis(), hlo_cost.cost(_text(compiled), dict(mesh.shape))
    whole = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    sent = sum(each.sent for each in cost.collectives)
    found = {
        "bytes": known["bytes"]
        | {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "all": whole,
            "hbm_bytes": cost.bytes,
            "ici_bytes": sent,
        },
        "collectives": [each._asdict() for each in cost.collectives],
        "loops_counted_once": cost.endless,
        "fits": not (chip and chip.memory) or whole <= chip.memory,
    }
    return found | {"estimates": estimates(known["flops"], cost, chip)} if chip else found


def _text(compiled: jax.stages.Compiled) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"JAX {jax.__version__} cannot read the output of this libtpu: run `pip install "
            f"'jax[tpu]=={jax.__version__}'` for the matching version."
        ) from error


def estimates(operations: float, cost: hlo_cost.Cost, chip: accelerators.Chip) -> dict[str, Any]:
    """Estimated seconds of a step: each term at the chip's peak rate, and the compiler's own
    estimate.

    The roofline is the longest term, a lower bound of the step that assumes full overlap.
    """
    sent = sum(each.sent for each in cost.collectives)
    terms = {"compute": operations / chip.product, "hbm": cost.bytes / chip.stream}
    if chip.wire:
        terms["ici"] = sent / chip.wire
    elif sent:  # devices share one memory
        terms["hbm"] += sent / chip.stream
    binds = max(terms, key=terms.get)
    found = {
        "seconds": terms,
        "roofline": terms[binds],
        "bottleneck": binds,
        "rates_measured": chip.measured,
    }
    if cost.cycles and chip.clock:
        found["compiler"] = cost.cycles / chip.clock
    found["step"] = max(found["roofline"], found.get("compiler", 0.0))
    found["utilization"] = terms["compute"] / found["step"]
    return found


def best(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """For each topology, the mesh that fits and has the least estimated step time."""
    chosen: dict[str, tuple[float, str]] = {}
    for label, each in found.items():
        if each["fits"] and "estimates" in each:
            topology, mesh = label.split(" ", 1)
            chosen[topology] = min(
                chosen.get(topology, (math.inf, "")), (each["estimates"]["step"], mesh)
            )
    return {topology: mesh for topology, (_, mesh) in chosen.items()}


def title(mesh: Mesh) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "alone"


def _sentence(each: dict[str, Any]) -> str:
    wants = f"{each['bytes']['all'] / 2**30:.2f} GiB" + (
        f" of {each['memory'] / 2**30:.1f}" if each["memory"] else ""
    )
    if not each["fits"]:
        return f"does not fit: needs {wants} per device"
    if "estimates" not in each:
        return f"{wants} per device"
    guess = each["estimates"]
    milliseconds = guess["step"] * 1e3
    return (
        f"{wants} per device, about {milliseconds:.3g} ms a step, limited by {guess['bottleneck']}"
    )


def _lines(spec: PlanSpec, stage: run.Stage, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    count = next(iter(found.values()))["num_params"]
    yield from (f"# {spec.experiment}, stage {stage.name}: {count / 1e6:.2f} M parameters", "")
    yield from (
        "Compiled, not run. Per device, in GiB (2^30); FLOPs from shapes, in T (10^12).",
        "",
    )
    head = [
        "",
        "clips a step",
        "parameters",
        "optimizer",
        "temporaries",
        "all",
        "memory",
        "fits",
        "FLOPs",
        "HBM bytes",
        "ICI bytes",
    ]
    yield from table(
        head,
        [
            [
                label,
                each["clips_per_step"],
                *(
                    _gib(each["bytes"].get(key))
                    for key in ("parameters", "optimizer", "temporary", "all")
                ),
                _gib(each["memory"]),
                "yes" if each["fits"] else "no",
                f"{each['flops'] / 1e12:.4g}",
                *(_gib(each["bytes"].get(key)) for key in ("hbm_bytes", "ici_bytes")),
            ]
            for label, each in found.items()
        ],
    )
    yield from ("", *_times(found), "")
    for topology, mesh in best(found).items():
        yield f"Best for {topology}by estimate: {mesh}."
    yield from ("", "Collectives of a step, most bytes first:", "")
    yield from table(
        ["", "", "axes", "times", "MiB sent"],
        [
            [
                label,
                each["op"],
                " x ".join(each["axes"]),
                each["times"],
                f"{each['sent'] / 2**20:.3f}",
            ]
            for label, one in found.items()
            for each in one.get("collectives", ())
        ],
    )


def _times(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    timed = {label: each for label, each in found.items() if "estimates" in each}
    if not timed:
        yield "This device kind is not in core/accelerators.py, so no time is estimated."
        return
    rates = (
        "measured on this machine in float32"
        if next(iter(timed.values()))["estimates"]["rates_measured"]
        else "as published"
    )
    yield from (
        f"Estimates in ms, at the chip's peak rates ({rates}); no step was run. The compiler's "
        "estimate omits attention kernels; HBM bytes are an upper bound if data stays in on-chip "
        "memory:",
        "",
    )
    rows = []
    for label, each in timed.items():
        guess = each["estimates"]
        rows.append(
            [
                label,
                *(_ms(guess["seconds"].get(key)) for key in ("compute", "hbm", "ici")),
                guess["bottleneck"],
                _ms(guess["roofline"]),
                _ms(guess.get("compiler")),
                f"{guess['utilization']:.2f}",
                f"{each['clips_per_step'] / guess['step'] / each['devices']:.4g}",
            ]
        )
    head = [
        "",
        "compute",
        "hbm",
        "ici",
        "bottleneck",
        "roofline",
        "compiler",
        "share of peak",
        "clips/s a device",
    ]
    yield from table(head, rows)


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.3f}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:.4g}"
