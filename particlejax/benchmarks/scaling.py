# SPDX-License-Identifier: Apache-2.0
"""Weak scaling from compiled programs: bytes a chip sends in a step against the number of chips."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from particlejax.config.job_specs import PlanSpec
from particlejax.core import accelerators, io
from particlejax.distributed import sharding
from particlejax.jobs import plan
from particlejax.reports.markdown import table
from particlejax.train import stage
from particlejax.train.log import log_info

_JOB = "bench_scaling"


def bench(spec: PlanSpec, workdir: Path, name: str) -> None:
    """Job 'bench_scaling': compiles every topology with every mesh; keeps existing entries of
    results.json.

    Raises UserError for an unavailable topology or mesh.
    """
    del name
    before = stage.read_results(workdir).get(_JOB, {})
    results: dict[str, dict[str, Any]] = {k: v for k, v in before.items() if "num_params" in v}
    for topology in plan.topologies(spec):
        devices = plan.devices_of(topology)
        meshes = [
            sharding.make_mesh(mesh_spec, devices)
            for mesh_spec in spec.meshes or plan.candidate_meshes(len(devices))
        ]
        missing = {
            label: mesh
            for mesh in meshes
            if (label := f"{topology} {plan.mesh_title(mesh)}") not in results
        }
        planned = plan.plan_stage(spec, devices) if missing else None
        for label, mesh in missing.items():
            results[label] = plan.analyze(
                planned, mesh, accelerators.chip_of(devices[0], len(devices))
            )
            log_info(
                f"{label}: {results[label]['bytes'].get('ici_bytes', 0.0) / 2**20:.1f} MiB sent by "
                "each "
                "device"
            )
            io.write_json(workdir / stage.RESULTS, {_JOB: results})
    text = "\n".join(_report(spec, results)) + "\n"
    io.write_text(workdir / "report.md", text)
    print(text)


def _mesh_axes(result: dict[str, Any]) -> str:
    return " x ".join(result["mesh"]) or "alone"


def _report(spec: PlanSpec, results: dict[str, dict[str, Any]]) -> Iterator[str]:
    count = next(iter(results.values()))["num_params"]
    yield from (f"# Scaling of {spec.experiment}: {count / 1e6:.2f} M parameters", "")
    yield from (
        f"{spec.per_device_batch_size or 'The same'} rows "
        f"{'per device' if spec.per_device_batch_size else 'over all devices'}. Compiled, not "
        "run: memory and collectives are the compiler's; times are estimates at published rates, "
        "or measured ones for a CPU.",
        "",
    )
    kinds = dict.fromkeys(map(_mesh_axes, results.values()))
    for kind in kinds:
        yield from ("", f"## Sharded over {kind}" if kind != "alone" else "## One device", "")
        yield from _table(
            {label: result for label, result in results.items() if _mesh_axes(result) == kind}
        )


def _table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One row a mesh; MiB sent per device for each collective, most first."""
    bytes_sent = {
        label: {
            f"{collective['op']}, {' x '.join(collective['axes'])}": collective["sent"]
            for collective in result.get("collectives", ())
        }
        for label, result in results.items()
    }
    exchanges = sorted(
        {key for bytes_by_exchange in bytes_sent.values() for key in bytes_by_exchange},
        key=lambda key: (
            -max(bytes_by_exchange.get(key, 0.0) for bytes_by_exchange in bytes_sent.values())
        ),
    )
    header = [
        "",
        "devices",
        "clips a step",
        "GiB per device",
        "fits",
        *(f"{key}, MiB" for key in exchanges),
        "all, MiB",
        "ICI, ms",
        "step, ms",
        "bottleneck",
    ]
    rows = []
    for label, result in results.items():
        guess = result.get("estimates", {"seconds": {}})
        rows.append(
            [
                label,
                result["devices"],
                result["clips_per_step"],
                f"{result['bytes']['all'] / 2**30:.2f}",
                "yes" if result["fits"] else "no",
                *(f"{bytes_sent[label].get(key, 0.0) / 2**20:.2f}" for key in exchanges),
                f"{sum(bytes_sent[label].values()) / 2**20:.2f}",
                _ms(guess["seconds"].get("ici")),
                _ms(guess.get("step")),
                guess.get("bottleneck", ""),
            ]
        )
    yield from table(header, rows)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:.4g}"
