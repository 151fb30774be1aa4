# SPDX-License-Identifier: Apache-2.0
"""Weak scaling from compiled programs: bytes a chip sends in a step against the number of chips."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from particlejax.config.jobs import PlanSpec
from particlejax.core import accelerators, io
from particlejax.distributed import sharding
from particlejax.jobs import plan
from particlejax.reports.markdown import table
from particlejax.train import stage
from particlejax.train.log import say

_JOB = "bench_scaling"


def bench(spec: PlanSpec, workdir: Path, name: str) -> None:
    """Job 'bench_scaling': compiles every topology with every mesh; keeps existing entries of
    results.json.

    Raises UserError for an unavailable topology or mesh.
    """
    del name
    before = stage.read_results(workdir).get(_JOB, {})
    found: dict[str, dict[str, Any]] = {k: v for k, v in before.items() if "num_params" in v}
    for topology in plan.topologies(spec):
        devices = plan.devices_of(topology)
        meshes = [
            sharding.make_mesh(each, devices)
            for each in spec.meshes or plan.candidates(len(devices))
        ]
        missing = {
            label: mesh
            for mesh in meshes
            if (label := f"{topology} {plan.title(mesh)}") not in found
        }
        prepared = plan.prepare(spec, devices) if missing else None
        for label, mesh in missing.items():
            found[label] = plan.figures(prepared, mesh, accelerators.of(devices[0], len(devices)))
            say(
                f"{label}: {found[label]['bytes'].get('ici_bytes', 0.0) / 2**20:.1f} MiB sent by "
                "each "
                "device"
            )
            io.write_json(workdir / stage.RESULTS, {_JOB: found})
    text = "\n".join(_lines(spec, found)) + "\n"
    io.write_text(workdir / "report.md", text)
    print(text)


def _divided(figures: dict[str, Any]) -> str:
    return " x ".join(figures["mesh"]) or "alone"


def _lines(spec: PlanSpec, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    count = next(iter(found.values()))["num_params"]
    yield from (f"# Scaling of {spec.experiment}: {count / 1e6:.2f} M parameters", "")
    yield from (
        f"{spec.per_device_batch_size or 'The same'} rows "
        f"{'per device' if spec.per_device_batch_size else 'over all devices'}. Compiled, not "
        "run: memory and collectives are the compiler's; times are estimates at published rates, "
        "or measured ones for a CPU.",
        "",
    )
    kinds = dict.fromkeys(map(_divided, found.values()))
    for kind in kinds:
        yield from ("", f"## Sharded over {kind}" if kind != "alone" else "## One device", "")
        yield from _table({label: each for label, each in found.items() if _divided(each) == kind})


def _table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One row a mesh; MiB sent per device for each collective, most first."""
    sent = {
        label: {
            f"{one['op']}, {' x '.join(one['axes'])}": one["sent"]
            for one in each.get("collectives", ())
        }
        for label, each in found.items()
    }
    exchanges = sorted(
        {key for each in sent.values() for key in each},
        key=lambda key: -max(each.get(key, 0.0) for each in sent.values()),
    )
    head = [
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
    for label, each in found.items():
        guess = each.get("estimates", {"seconds": {}})
        rows.append(
            [
                label,
                each["devices"],
                each["clips_per_step"],
                f"{each['bytes']['all'] / 2**30:.2f}",
                "yes" if each["fits"] else "no",
                *(f"{sent[label].get(key, 0.0) / 2**20:.2f}" for key in exchanges),
                f"{sum(sent[label].values()) / 2**20:.2f}",
                _ms(guess["seconds"].get("ici")),
                _ms(guess.get("step")),
                guess.get("bottleneck", ""),
            ]
        )
    yield from table(head, rows)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:.4g}"
