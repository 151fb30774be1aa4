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

from particlejax.config import jobs
from particlejax.config.experiment import Experiment
from particlejax.config.job_specs import PlanSpec
from particlejax.config.training import MeshSpec
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
from particlejax.train.log import log_info
from particlejax.train.train_state import TrainState, abstract_state, jit_step

LOCAL = "here"
_NOMINAL_STEPS = 1000  # for a stage with num_epochs: only constants of its schedule depend on this
_FSDP_SIZE = 8  # fsdp devices of the mesh with data and fsdp
_TENSOR_SIZE = 4  # tensor devices of the mesh with tensor parallelism
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class PlannedStage:
    """A stage as the devices run it, its batch size in rows, and its FLOPs over all devices."""

    stage: run.Stage
    targets: Any  # targets of the labels
    batch_size: int
    flops: int


def plan(spec: PlanSpec, workdir: Path, name: str) -> None:
    """Job 'plan': each topology with each mesh; writes results.json and report.md. Raises UserError
    if a topology is unavailable.
    """
    del name
    results: dict[str, dict[str, Any]] = {}
    for topology in topologies(spec):
        devices = devices_of(topology)
        chip = accelerators.chip_of(devices[0], len(devices))
        planned = plan_stage(spec, devices)
        stage = planned.stage
        for mesh_spec in spec.meshes or candidate_meshes(len(devices)):
            mesh = sharding.make_mesh(mesh_spec, devices)
            label = f"{topology} {mesh_title(mesh)}"
            start = time.monotonic()
            results[label] = analyze(planned, mesh, chip)
            results[label]["seconds_to_compile"] = round(time.monotonic() - start, 1)
            log_info(f"{label}: {_summary(results[label])}")
            # after each mesh, as one may take minutes
            io.write_json(
                workdir / run.RESULTS, {stage.name: results, "best": best_meshes(results)}
            )
    path = workdir / "report.md"
    io.write_text(path, "\n".join(_report(spec, stage, results)) + "\n")
    print(path.read_text(encoding="utf-8"))
    log_info(f"report: {path}")


def plan_stage(spec: PlanSpec, devices: Sequence[jax.Device]) -> PlannedStage:
    """The stage for these devices. FLOPs are of plain attention: fused kernels recompute some."""
    reference_stage, targets = load_stage(spec, "xla")
    batch_size = spec.per_device_batch_size * len(devices) or reference_stage.spec.batch_size
    single_device = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), sharding.AXES)
    step_flops = flops.count(
        _trace_step(reference_stage, targets, batch_size, single_device)[0].jaxpr
    )
    stage, _ = load_stage(spec, "auto")
    return PlannedStage(stage, targets, batch_size, step_flops)


def load_stage(spec: PlanSpec, attention: str) -> tuple[run.Stage, Any]:
    """The stage with its targets; the source is opened only if it defines the classes.

    attention: replaces config.model.attention_impl='auto'.
    """
    if not spec.experiment:
        raise UserError(
            "config.experiment is empty: set the file to plan with "
            "--config.experiment=experiments/NAME.py."
        )
    config, _ = config_files.configure(spec.experiment, spec.overrides)
    experiment = jobs.parse_job(config.to_dict())
    if not isinstance(experiment, Experiment):
        raise UserError(
            f"{spec.experiment} trains nothing (its job is {experiment.job}): set "
            "config.experiment to a file with stages."
        )
    if experiment.model.attention_impl == "auto":
        experiment = replace(experiment, model=replace(experiment.model, attention_impl=attention))
    name = spec.stage or next(iter(experiment.stages), "")
    if name not in experiment.stages:
        names = ", ".join(experiment.stages) or "none"
        raise UserError(
            f"config.stage={spec.stage!r} is not a stage of {spec.experiment}: it has {names}."
        )
    stage_spec = experiment.stages[name]
    if not registry.classifies(stage_spec.objectives):
        stage = run.build_stage(experiment, name, ())
        return stage, stage.targets
    data = experiment.data_of(stage_spec)
    source = sources.open_split(data)
    stage = run.build_stage(experiment, name, source.classes)
    return stage, run.class_weighted_targets(stage, source)


def topologies(spec: PlanSpec) -> list[str]:
    """The topologies of config.topology."""
    return [name.strip() for name in spec.topology.split(",")]


def devices_of(topology: str) -> Sequence[jax.Device]:
    """Local devices for 'here', the first N for 'here:N', else those of a TPU topology. Raises
    UserError if they are unavailable.
    """
    platform, _, count = topology.partition(":")
    if platform == LOCAL:
        devices = jax.devices()
        if count and not (count.isdigit() and 0 < int(count) <= len(devices)):
            raise UserError(
                f"config.topology={topology!r}: use 1 to {len(devices)} local devices, such as "
                f"{LOCAL}:1."
            )
        return devices[: int(count)] if count else devices
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"config.topology={topology!r} needs the TPU compiler: run "
            f"`{install_line('plan')}`, or plan for {LOCAL!r}."
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
    options = {} if set(count.split("x")) - {"1"} else {"chips_per_host_bounds": [1, 1, 1]}
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"config.topology={topology!r} is not a TPU topology: write it as v5e:16x16, "
            "v5p:4x4x4 or v6e:16x16."
        ) from error


def candidate_meshes(num_devices: int) -> list[MeshSpec]:
    """Meshes to compare: data, fsdp, both, and fsdp with tensor parallelism."""
    meshes = [MeshSpec(), MeshSpec(data=1, fsdp=-1)]
    if num_devices > _FSDP_SIZE and num_devices % _FSDP_SIZE == 0:
        meshes.append(MeshSpec(fsdp=_FSDP_SIZE))
    if num_devices > _TENSOR_SIZE and num_devices % _TENSOR_SIZE == 0:
        meshes.append(MeshSpec(data=1, fsdp=-1, tensor=_TENSOR_SIZE))
    return meshes if num_devices > 1 else meshes[:1]


def analyze(planned: PlannedStage, mesh: Mesh, chip: accelerators.Chip | None) -> dict[str, Any]:
    """The figures of the step on a mesh; parameters and batch are abstract shapes."""
    spec, stage = planned.stage.spec, planned.stage
    sharding.check_rows(
        planned.batch_size // spec.grad_accum_steps,
        mesh,
        f"config.stages.{stage.name}.batch_size / grad_accum_steps",
    )
    traced, state = _trace_step(stage, planned.targets, planned.batch_size, mesh)
    num_clips = planned.batch_size * stage.data.clips_per_row
    summary = {
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "devices": mesh.size,
        "kind": mesh.devices.flat[0].device_kind,
        "clips_per_step": num_clips,
        "num_params": sum(x.size for x in jax.tree.leaves((state.params, state.frozen))),
        "bytes": {
            "parameters": _bytes_per_device((state.params, state.frozen, state.average)),
            "optimizer": _bytes_per_device(state.opt_state),
        },
        "flops": planned.flops / mesh.size,
        "memory": chip.memory_bytes if chip else 0.0,
    }
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        match = _OUT_OF_MEMORY.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not match:
            raise
        needed, available = float(match[1]) * _UNITS[match[2]], float(match[3]) * _UNITS[match[4]]
        return summary | {
            "fits": False,
            "bytes": summary["bytes"] | {"all": needed},
            "memory": available,
        }
    return summary | _compiled_summary(compiled, summary, mesh, chip)


def _trace_step(
    stage: run.Stage, targets: Any, batch_size: int, mesh: Mesh
) -> tuple[jax.stages.Traced, TrainState]:
    spec = stage.spec
    program = train_step.build_program(stage, targets, spec.num_steps or _NOMINAL_STEPS)
    state = abstract_state(
        stage.model, program.optimizer, stage.example, spec.ema_decay, mesh, spec.finetune
    )
    return jit_step(program.step, state, mesh).trace(state, batch_shapes(stage, batch_size)), state


def batch_shapes(stage: run.Stage, batch_size: int) -> Batch:
    """Abstract shapes of the data's batches."""
    example = pipeline.zero_batch(
        pipeline.row_shape(stage.data, stage.particles, stage.spec.scale_schedule), 1
    )
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), example
    )


def _bytes_per_device(shapes: Any) -> int:
    """Bytes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )


def _compiled_summary(
    compiled: jax.stages.Compiled,
    summary: dict[str, Any],
    mesh: Mesh,
    chip: accelerators.Chip | None,
) -> dict[str, Any]:
    memory, cost = compiled.memory_analysis(), hlo_cost.cost(_text(compiled), dict(mesh.shape))
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    bytes_sent = sum(collective.sent for collective in cost.collectives)
    measured = {
        "bytes": summary["bytes"]
        | {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "all": total,
            "hbm_bytes": cost.bytes,
            "ici_bytes": bytes_sent,
        },
        "collectives": [collective._asdict() for collective in cost.collectives],
        "loops_counted_once": cost.loops_without_trip_count,
        "fits": not (chip and chip.memory_bytes) or total <= chip.memory_bytes,
    }
    return measured | {"estimates": estimates(summary["flops"], cost, chip)} if chip else measured


def _text(compiled: jax.stages.Compiled) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"JAX {jax.__version__} cannot read the output of this libtpu: run `pip install "
            f"'jax[tpu]=={jax.__version__}'` for the matching version."
        ) from error


def estimates(step_flops: float, cost: hlo_cost.Cost, chip: accelerators.Chip) -> dict[str, Any]:
    """Estimated seconds of a step: each term at the chip's peak rate, and the compiler's own
    estimate.

    The roofline is the longest term, a lower bound of the step that assumes full overlap.
    """
    bytes_sent = sum(collective.sent for collective in cost.collectives)
    terms = {"compute": step_flops / chip.peak_flops, "hbm": cost.bytes / chip.hbm_bandwidth}
    if chip.ici_bandwidth:
        terms["ici"] = bytes_sent / chip.ici_bandwidth
    elif bytes_sent:  # devices share one memory
        terms["hbm"] += bytes_sent / chip.hbm_bandwidth
    bottleneck = max(terms, key=terms.get)
    estimate = {
        "seconds": terms,
        "roofline": terms[bottleneck],
        "bottleneck": bottleneck,
        "rates_measured": chip.measured,
    }
    if cost.cycles and chip.clock_hz:
        estimate["compiler"] = cost.cycles / chip.clock_hz
    estimate["step"] = max(estimate["roofline"], estimate.get("compiler", 0.0))
    estimate["utilization"] = terms["compute"] / estimate["step"]
    return estimate


def best_meshes(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """For each topology, the mesh that fits and has the least estimated step time."""
    fastest: dict[str, tuple[float, str]] = {}
    for label, result in results.items():
        if result["fits"] and "estimates" in result:
            topology, mesh = label.split(" ", 1)
            fastest[topology] = min(
                fastest.get(topology, (math.inf, "")), (result["estimates"]["step"], mesh)
            )
    return {topology: mesh for topology, (_, mesh) in fastest.items()}


def mesh_title(mesh: Mesh) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "alone"


def _summary(result: dict[str, Any]) -> str:
    memory = f"{result['bytes']['all'] / 2**30:.2f} GiB" + (
        f" of {result['memory'] / 2**30:.1f}" if result["memory"] else ""
    )
    if not result["fits"]:
        return f"does not fit: needs {memory} per device"
    if "estimates" not in result:
        return f"{memory} per device"
    estimate = result["estimates"]
    milliseconds = estimate["step"] * 1e3
    return (
        f"{memory} per device, about {milliseconds:.3g} ms a step, limited by "
        f"{estimate['bottleneck']}"
    )


def _report(spec: PlanSpec, stage: run.Stage, results: dict[str, dict[str, Any]]) -> Iterator[str]:
    count = next(iter(results.values()))["num_params"]
    yield from (f"# {spec.experiment}, stage {stage.name}: {count / 1e6:.2f} M parameters", "")
    yield from (
        "Compiled, not run. Per device, in GiB (2^30); FLOPs from shapes, in T (10^12).",
        "",
    )
    header = [
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
        header,
        [
            [
                label,
                result["clips_per_step"],
                *(
                    _gib(result["bytes"].get(key))
                    for key in ("parameters", "optimizer", "temporary", "all")
                ),
                _gib(result["memory"]),
                "yes" if result["fits"] else "no",
                f"{result['flops'] / 1e12:.4g}",
                *(_gib(result["bytes"].get(key)) for key in ("hbm_bytes", "ici_bytes")),
            ]
            for label, result in results.items()
        ],
    )
    yield from ("", *_estimate_table(results), "")
    for topology, mesh in best_meshes(results).items():
        yield f"Best for {topology}by estimate: {mesh}."
    yield from ("", "Collectives of a step, most bytes first:", "")
    yield from table(
        ["", "", "axes", "times", "MiB sent"],
        [
            [
                label,
                collective["op"],
                " x ".join(collective["axes"]),
                collective["times"],
                f"{collective['sent'] / 2**20:.3f}",
            ]
            for label, result in results.items()
            for collective in result.get("collectives", ())
        ],
    )


def _estimate_table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    estimated = {label: result for label, result in results.items() if "estimates" in result}
    if not estimated:
        yield "This device kind is not in core/accelerators.py, so no time is estimated."
        return
    rates = (
        "measured on this machine in float32"
        if next(iter(estimated.values()))["estimates"]["rates_measured"]
        else "as published"
    )
    yield from (
        f"Estimates in ms, at the chip's peak rates ({rates}); no step was run. The compiler's "
        "estimate omits attention kernels; HBM bytes are an upper bound if data stays in on-chip "
        "memory:",
        "",
    )
    rows = []
    for label, result in estimated.items():
        estimate = result["estimates"]
        rows.append(
            [
                label,
                *(_ms(estimate["seconds"].get(key)) for key in ("compute", "hbm", "ici")),
                estimate["bottleneck"],
                _ms(estimate["roofline"]),
                _ms(estimate.get("compiler")),
                f"{estimate['utilization']:.2f}",
                f"{result['clips_per_step'] / estimate['step'] / result['devices']:.4g}",
            ]
        )
    header = [
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
    yield from table(header, rows)


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.3f}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:.4g}"
