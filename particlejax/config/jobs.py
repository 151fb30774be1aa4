# SPDX-License-Identifier: Apache-2.0
"""All jobs, and the config.json of a run: reading, upgrading, writing."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from particlejax.config import job_specs, plugins, renames
from particlejax.config.experiment import Experiment
from particlejax.config.fields import Spec, as_dict, make
from particlejax.core.errors import UserError
from particlejax.core.suggest import did_you_mean


class Job(NamedTuple):
    """A job: its settings class, and the module and function that run it, imported when it runs."""

    spec: type[Spec]
    function: str


JOBS = {
    "train": Job(Experiment, "jobs.train:train"),
    "sweep": Job(job_specs.SweepJob, "jobs.sweep:sweep"),
    "evaluate": Job(job_specs.EvaluateJob, "jobs.evaluate:evaluate"),
    "probe": Job(job_specs.ProbeSpec, "jobs.probe:probe"),
    "fewshot_prototypes": Job(job_specs.FewshotPrototypesJob, "jobs.fewshot:fewshot_prototypes"),
    "active_learning": Job(job_specs.ActiveLearningJob, "jobs.fewshot:active_learning"),
    "model_soup": Job(job_specs.ModelSoupJob, "jobs.model_soup:model_soup"),
    "import_weights": Job(job_specs.ImportSpec, "jobs.import_weights:import_weights"),
    "predict": Job(job_specs.PredictSpec, "jobs.predict:predict"),
    "linear_probe": Job(job_specs.LinearProbeSpec, "jobs.linear_probe:linear_probe"),
    "extract_features": Job(
        job_specs.ExtractFeaturesSpec, "jobs.extract_features:extract_features"
    ),
    "prepare_data": Job(job_specs.PrepareDataJob, "jobs.prepare_data:prepare_data"),
    "check_data": Job(job_specs.CheckDataJob, "jobs.check_data:check_data"),
    "plan": Job(job_specs.PlanSpec, "jobs.plan:plan"),
    "bench_dataloader": Job(job_specs.BenchJob, "benchmarks.dataloader:bench"),
    "bench_particles": Job(job_specs.BenchJob, "benchmarks.particles:bench"),
    "bench_fault_tolerance": Job(job_specs.BenchJob, "benchmarks.fault_tolerance:bench"),
    "bench_videomae": Job(job_specs.BenchJob, "benchmarks.videomae:bench"),
    "bench_scaling": Job(job_specs.PlanSpec, "benchmarks.scaling:bench"),
}


def spec_of(job: str) -> type[Spec]:
    """Returns the settings class of a job; that of job train for an unknown one."""
    job = renames.JOBS.get(job, job)
    return JOBS[job].spec if job in JOBS else Experiment


def parse_job(config: Mapping[str, Any]) -> Any:
    """Builds the settings of a config's job, after its plugins are imported.

    Raises UserError for an unknown job and for an invalid key or value.
    """
    job = config.get("job", "train")
    if job not in JOBS and job not in renames.JOBS:
        raise UserError(f"config.job is {job!r}: {did_you_mean(job, JOBS)}")
    plugins.load(*config.get("plugins", ()))
    spec = spec_of(job)
    for key in config:
        readers = [name for name, other in JOBS.items() if _has(other.spec, key)]
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
