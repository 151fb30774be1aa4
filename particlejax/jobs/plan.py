# SPDX-License-Identifier: Apache-2.0
"""What the train step of an experiment needs and takes on a mesh, from its program compiled ahead
of time: does it fit, what limits it, which mesh is best. For TPUs that are not there (the `libtpu`
package) or for the devices at hand.

Memory and collectives are the compiler's; times are estimates. Everything is for one device unless
it says otherwise.
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
_STEPS = 1000  # of a stage that counts epochs: constants of its schedule, which cost nothing
_SPLIT = 8  # devices that share the parameters where rows are divided over more
_TENSOR = 4  # devices that share each product in the mesh that does so
_OVER = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Prepared:
    """A stage as the devices run it, how many rows its batches have, and what they cost: operations
    over all devices.
    """

    stage: run.Stage
    goal: Any  # what labels ask of the head
    rows: int
    operations: int


def plan(spec: PlanSpec, workdir: Path, name: str) -> None:
    """Job 'plan': each topology with each mesh; results.json and report.md. Raises UserError where
    it cannot.
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
            # each may take minutes
            io.write_json(workdir / run.RESULTS, {stage.name: found, "best": best(found)})
    path = workdir / "report.md"
    io.write_text(path, "\n".join(_lines(spec, stage, found)) + "\n")
    print(path.read_text(encoding="utf-8"))
    say(f"report: {path}")


def prepare(spec: PlanSpec, devices: Sequence[jax.Device]) -> Prepared:
    """The stage for these devices. Its operations are those of plain attention: kernels compute
    some of it twice.
    """
    plain, goal = stage_of(spec, "xla")
    rows = spec.per_device_batch_size * len(devices) or plain.spec.batch_size
    alone = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), sharding.AXES)
    operations = flops.count(_traced(plain, goal, rows, alone)[0].jaxpr)
    stage, _ = stage_of(spec, "auto")
    return Prepared(stage, goal, rows, operations)


def stage_of(spec: PlanSpec, attention: str) -> tuple[run.Stage, Any]:
    """The stage with its targets; its clips are asked for only where they say what the classes are.

    attention: as config.model.attention_impl, where the experiment leaves it 'auto'.
    """
    if not spec.experiment:
        raise UserError(
            "config.experiment is empty: name the file to plan with "
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
            f"config.stage={spec.stage!r} is no stage of {spec.experiment}: it has {known}."
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
    """Their names, one by one."""
    return [each.strip() for each in spec.topology.split(",")]


def devices_of(topology: str) -> Sequence[jax.Device]:
    """The devices at hand for 'here', of 'here:N' the first N, else those of a TPU topology. Raises
    UserError where it cannot.
    """
    place, _, number = topology.partition(":")
    if place == HERE:
        devices = jax.devices()
        if number and not (number.isdigit() and 0 < int(number) <= len(devices)):
            raise UserError(
                f"config.topology={topology!r}: of the devices at hand name 1 to {len(devices)}, "
                f"as in {HERE}:1."
            )
        return devices[: int(number)] if number else devices
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"config.topology={topology!r} needs the TPU compiler: run "
            f"`{install_line('plan')}`, or plan for {HERE!r}."
        )
    # else it asks a cloud for the machine that it runs on
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # else one plan at a time: no chip is used that they could fight over
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")  # else jax looks for the TPU that is not here
    # no device is here that could load a program again
    jax.config.update("jax_enable_compilation_cache", False)
    from jax.experimental import topologies  # its TPU part is there with libtpu alone

    # else a host has at least four
    alone = {} if set(number.split("x")) - {"1"} else {"chips_per_host_bounds": [1, 1, 1]}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"config.topology={topology!r} is no TPU that the compiler knows: write it as "
            "v5e:16x16, v5p:4x4x4 or "
            "v6e:16x16."
        ) from error


def candidates(devices: int) -> list[MeshSpec]:
    """Meshes worth a comparison: rows divided alone, parameters too, both, and products as well."""
    found = [MeshSpec(), MeshSpec(data=1, fsdp=-1)]
    if devices > _SPLIT and devices % _SPLIT == 0:
        found.append(MeshSpec(fsdp=_SPLIT))
    if devices > _TENSOR and devices % _TENSOR == 0:
        found.append(MeshSpec(data=1, fsdp=-1, tensor=_TENSOR))
    return found if devices > 1 else found[:1]


def figures(prepared: Prepared, mesh: Mesh, chip: accelerators.Chip | None) -> dict[str, Any]:
    """All that is known of the step on a mesh; parameters and batch are shapes alone."""
    spec, stage = prepared.stage.spec, prepared.stage
    sharding.check_rows(
        prepared.rows // spec.grad_accum_steps,
        mesh,
        f"config.stages.{stage.name}.rows / accumulate",
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
    """Shapes of the batches as they come from the data."""
    row = pipeline.example(
        pipeline.row_of(stage.data, stage.particles, stage.spec.scale_schedule), 1
    )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), row)


def _held(part: Any) -> int:
    """Bytes of one device's share."""
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
            f"JAX {jax.__version__} cannot read what this libtpu compiled: run `pip install "
            f"'jax[tpu]=={jax.__version__}'`, which brings the one that it knows."
        ) from error


def estimates(operations: float, cost: hlo_cost.Cost, chip: accelerators.Chip) -> dict[str, Any]:
    """Seconds of a step, none of them measured: each term alone at the chip's best, and the
    compiler's own where it has one.

    The roofline is the longest term, as though the others hid behind it; a step takes no less.
    """
    sent = sum(each.sent for each in cost.collectives)
    terms = {"compute": operations / chip.product, "hbm": cost.bytes / chip.stream}
    if chip.wire:
        terms["ici"] = sent / chip.wire
    elif sent:  # devices of one memory
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
    """Of each topology the mesh that fits with the least estimated step."""
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
        return f"does not fit, it wants {wants} on each device"
    if "estimates" not in each:
        return f"{wants} on each device"
    guess = each["estimates"]
    milliseconds = guess["step"] * 1e3
    return (
        f"{wants} on each device, a step of about {milliseconds:.3g} ms, bound by "
        f"{guess['bottleneck']}"
    )


def _lines(spec: PlanSpec, stage: run.Stage, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    count = next(iter(found.values()))["num_params"]
    yield from (f"# {spec.experiment}, stage {stage.name}: {count / 1e6:.2f} M parameters", "")
    yield from (
        "Compiled, not run. For one device, in GiB (2^30); FLOPs from shapes, in T (10^12).",
        "",
    )
    head = [
        "",
        "clips a step",
        "parameters",
        "optimiser",
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
        yield f"Best for {topology}, as far as estimates tell: {mesh}."
    yield from ("", "Collectives of a step, the dearest first:", "")
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
        yield "This kind of device is not in chips.py, so no time is estimated."
        return
    rates = (
        "measured on this machine in float32"
        if next(iter(timed.values()))["estimates"]["rates_measured"]
        else "as published"
    )
    yield from (
        f"Estimates in ms, at the chip's best rates ({rates}); no step was run. The compiler's "
        "leaves out kernels of "
        "attention, what is streamed is counted high where a chip keeps it in fast memory:",
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
        "compiler's",
        "share of peak",
        "clips/s a device",
    ]
    yield from table(head, rows)


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.3f}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:.4g}"
