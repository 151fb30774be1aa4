# SPDX-License-Identifier: Apache-2.0
"""The settings class of each job, and the config.json of a run: reading, upgrading, writing."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from particlejax.config import job_specs, plugins, renames
from particlejax.config.experiment import Experiment
from particlejax.config.fields import Spec, as_dict, make
from particlejax.core.errors import UserError
from particlejax.core.suggest import did_you_mean

SPECS: dict[str, type[Spec]] = {
    "train": Experiment,
    "sweep": job_specs.SweepJob,
    **dict.fromkeys(
        ("bench_dataloader", "bench_particles", "bench_fault_tolerance", "bench_videomae"),
        job_specs.BenchJob,
    ),
    "evaluate": job_specs.EvaluateJob,
    "probe": job_specs.ProbeSpec,
    "fewshot_prototypes": job_specs.FewshotPrototypesJob,
    "active_learning": job_specs.ActiveLearningJob,
    "model_soup": job_specs.ModelSoupJob,
    "import_weights": job_specs.ImportSpec,
    "predict": job_specs.PredictSpec,
    "linear_probe": job_specs.LinearProbeSpec,
    "extract_features": job_specs.ExtractFeaturesSpec,
    "prepare_data": job_specs.PrepareDataJob,
    "check_data": job_specs.CheckDataJob,
    "plan": job_specs.PlanSpec,
    "bench_scaling": job_specs.PlanSpec,
}


def spec_of(job: str) -> type[Spec]:
    """Returns the settings class of a job; that of job train for an unknown one."""
    return SPECS.get(renames.JOBS.get(job, job), Experiment)


def parse_job(config: Mapping[str, Any]) -> Any:
    """Builds the settings of a config's job, after its plugins are imported.

    Raises UserError for an unknown job and for an invalid key or value.
    """
    job = config.get("job", "train")
    if job not in SPECS and job not in renames.JOBS:
        raise UserError(f"config.job is {job!r}: {did_you_mean(job, SPECS)}")
    plugins.load(*config.get("plugins", ()))
    spec = spec_of(job)
    for key in config:
        readers = [name for name, other in SPECS.items() if _has(other, key)]
        if readers and not _has(spec, key):
            raise UserError(
                f"config.{key} is not read by job {job} but by {', '.join(readers[:4])}: remove "
                "it, or set config.job."
            )
    return make(spec, config, "config")


def _has(spec: type[Spec], key: str) -> bool:
    return any(field.name == key for field in dataclasses.fields(spec))


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config of any format in today's.

    Format 1 has old names. Up to format 2 every config held the sections of all jobs: those that
    the job does not read are left out.
    """
    config = {"format": 1, **config}
    written = config.pop("format")
    if written == renames.FORMAT:
        return config
    if written not in range(1, renames.FORMAT):
        raise UserError(f"the config has format {written}: update particlejax to read it.")
    spec = spec_of(config.get("job", ""))
    return _known_keys(spec, renames.upgrade(spec, config) if written == 1 else config)


def _known_keys(spec: type[Spec], config: Mapping[str, Any]) -> dict[str, Any]:
    types = {field.name: field.type for field in dataclasses.fields(spec)}
    return {
        key: _known_keys(types[key], value)
        if dataclasses.is_dataclass(types[key]) and isinstance(value, Mapping)
        else value
        for key, value in config.items()
        if key in types
    }


def read(path: Path) -> dict[str, Any]:
    """Reads the config.json of a run, with every key of today."""
    config = upgraded(json.loads(path.read_text(encoding="utf-8")))
    return json.loads(json.dumps(as_dict(parse_job(config))))


def written(job: Spec) -> dict[str, Any]:
    """Returns the content of config.json."""
    return {"format": renames.FORMAT, **as_dict(job)}
