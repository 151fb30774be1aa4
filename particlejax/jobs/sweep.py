# SPDX-License-Identifier: Apache-2.0
"""Sweeps: several runs of one experiment with different settings; resumable, with a table and
plots.

Every run has its own folder, runs/NAME/SEED, and is an ordinary run. The table is read from these
folders, so it is complete whichever process trained them. Optuna's storage, if set, shares the runs
among processes.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from particlejax.config.experiment import Experiment
from particlejax.config.fields import as_dict
from particlejax.config.job_specs import SweepJob
from particlejax.core import io, tree
from particlejax.core.suggest import did_you_mean
from particlejax.core.typing import UserError
from particlejax.jobs import optuna_sweep
from particlejax.jobs.train import train
from particlejax.reports import plots
from particlejax.reports.markdown import table
from particlejax.train import loop, run_dir, run_lock
from particlejax.train import stage as run
from particlejax.train.log import log_info

_COSTS = {
    "particles": "particles a clip",
    "gflops": "training GFLOP a clip",
    "seconds": "seconds of training",
}


_LONGEST_NAME = 100  # bytes of a folder's name, of 255 that file systems allow


class SweepRun(NamedTuple):
    """One run of a sweep."""

    name: str
    seed: int
    experiment: SweepJob

    def folder(self, sweep_dir: Path) -> Path:
        """The run's folder."""
        return sweep_dir / "runs" / folder_name(self.name) / f"seed{self.seed}"


def folder_name(name: str) -> str:
    """A file name for a run of any name, readable and different for different names.

    Letters, digits and _ . + = @ - stay; runs of other characters become one _, and part of a hash
    of the name follows.
    """
    if re.fullmatch(r"\w[\w.+=@-]*", name) and len(name.encode()) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:8]
    readable = re.sub(r"[^\w.+=@-]+", "_", name).encode()[:_LONGEST_NAME].decode(errors="ignore")
    return f"{readable.strip('_.-')}_{digest}".lstrip("_")


def sweep(experiment: SweepJob, sweep_dir: Path, name: str) -> None:
    """Job 'sweep': all runs of config.sweep, or config.sweep.num_trials trials; results.json,
    report.md.
    """
    del name
    spec = experiment.sweep
    if not spec.runs:
        raise UserError("config.sweep.runs is empty: give runs, each a name with its settings.")
    runs = plan_runs(experiment)  # check all runs before the first starts
    _check_metric(runs, spec.metric)
    if spec.num_trials:
        runs = _search(experiment, sweep_dir)
    elif spec.storage:
        names = [f"{sweep_run.name}/seed{sweep_run.seed}" for sweep_run in runs]
        optuna_sweep.run_each(
            spec.storage, str(sweep_dir.absolute()), names, lambda i: _run_one(runs[i], sweep_dir)
        )
    else:
        for i, sweep_run in enumerate(runs):
            log_info(f"sweep: run {i + 1} of {len(runs)}, {sweep_run.name}, seed {sweep_run.seed}")
            _run_one(sweep_run, sweep_dir)
    metrics = collect(runs, spec.metric, sweep_dir)
    run.add_results(sweep_dir, "sweep", metrics, {})
    io.write_text(sweep_dir / "report.md", "\n".join(_report(experiment, metrics, sweep_dir)))
    log_info(f"report: {sweep_dir / 'report.md'}")
    failed = [f"{key} ({row['error']})" for key, row in metrics.items() if row["error"]]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(metrics)} have failed runs: {'; '.join(failed[:3])}: fix the "
            "cause and run the same command again."
        )


def _check_metric(runs: list[SweepRun], metric: str) -> None:
    """Raises UserError if a run will not have the metric of the sweep."""
    parts = metric.split("/", 2)
    if len(parts) < 3:
        raise UserError(f"config.sweep.metric={metric!r}: write it as stage/split/figure.")
    name, split, metric_name = parts
    for sweep_run in runs:
        stages = sweep_run.experiment.stages
        if name not in stages:
            raise UserError(
                f"config.sweep.metric={metric!r} is of stage {name!r}, which run {sweep_run.name} "
                f"does not have: {did_you_mean(name, stages)}"
            )
        expected = loop.expected_metrics(sweep_run.experiment, name)
        if split not in expected:
            raise UserError(
                f"config.sweep.metric={metric!r} is of split {split!r}, which stage {name} does "
                f"not measure: {did_you_mean(split, expected)}"
            )
        if expected[split] and metric_name not in expected[split]:
            raise UserError(
                f"config.sweep.metric={metric!r} is not measured: "
                f"{did_you_mean(metric_name, expected[split])}"
            )


def plan_runs(experiment: SweepJob) -> list[SweepRun]:
    """All runs, ordered by seed, so that a stopped sweep has complete seeds. Raises UserError if
    one is invalid.
    """
    spec = experiment.sweep
    return [
        _run(experiment, name, changes, seed)
        for seed, (name, changes) in itertools.product(spec.seeds, spec.runs.items())
    ]


def _run(experiment: SweepJob, name: str, changes: Mapping[str, Any], seed: int) -> SweepRun:
    settings = as_dict(experiment) | {"job": "train", "seed": seed}
    del settings["sweep"]
    return SweepRun(name, seed, Experiment.of(_merge_settings(settings, changes)))


def _merge_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    inner = {
        key: _merge_settings(settings.get(key) or {}, value)
        for key, value in changes.items()
        if isinstance(value, Mapping)
    }
    return {**settings, **changes, **inner}


def _search(experiment: SweepJob, sweep_dir: Path) -> list[SweepRun]:
    """Trials that combine all values which each differing setting has in any of the runs."""
    spec = experiment.sweep
    space: dict[str, list[Any]] = {}
    for changes in spec.runs.values():
        for key, value in _flatten_settings(changes):
            if value not in space.setdefault(key, []):
                space[key].append(value)

    def make_trial(settings: dict[str, Any], trial_number: int) -> SweepRun:
        return _run(experiment, f"trial{trial_number:03d}", tree.nest(settings), spec.seeds[0])

    def measure(settings: dict[str, Any], trial_number: int) -> float:
        trial = make_trial(settings, trial_number)
        _run_one(trial, sweep_dir)
        row = collect([trial], spec.metric, sweep_dir)[trial.name]
        if row["error"]:
            raise UserError(row["error"])
        return row["mean"]

    trials = optuna_sweep.search(
        spec.storage or str(sweep_dir.absolute() / "search.journal"),
        str(sweep_dir.absolute()),
        spec.num_trials,
        experiment.seed,
        space,
        measure,
    )
    started = {
        number: settings
        for number, settings in trials.items()
        if (sweep_dir / "runs" / f"trial{number:03d}").exists()
    }
    # the others had incompatible settings
    return [make_trial(settings, number) for number, settings in started.items()]


def _flatten_settings(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from _flatten_settings(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _run_one(sweep_run: SweepRun, sweep_dir: Path) -> Path:
    """Trains or resumes one run; a UserError is written to error.txt in its folder."""
    folder = sweep_run.folder(sweep_dir)
    stages = run.read_results(folder)
    if all("train" in stages.get(stage, {}) for stage in sweep_run.experiment.stages):
        log_info(f"{folder}: already done")
        return folder
    with run_lock.hold(folder):
        run_dir.enter(folder, sweep_run.experiment)
        error = folder / "error.txt"
        error.unlink(missing_ok=True)
        try:
            train(sweep_run.experiment, folder, f"{sweep_run.name}-seed{sweep_run.seed}")
        except UserError as problem:
            log_info(f"{folder}: {problem}")
            error.write_text(str(problem), encoding="utf-8", errors="backslashreplace")
    return folder


def collect(runs: list[SweepRun], metric: str, sweep_dir: Path) -> dict[str, dict[str, Any]]:
    """For each name the figures of all finished seeds, with mean and standard deviation."""
    stage, split, metric_name = metric.split("/", 2)
    rows: dict[str, dict[str, Any]] = {}
    for sweep_run in runs:
        row = rows.setdefault(
            sweep_run.name,
            {
                "folder": f"runs/{folder_name(sweep_run.name)}",
                "seeds": [],
                "values": [],
                "error": "",
                **{key: [] for key in _COSTS},
                "clips_per_second": [],
            },
        )
        folder = sweep_run.folder(sweep_dir)
        if (folder / "error.txt").exists():
            row["error"] = (folder / "error.txt").read_text(encoding="utf-8")
        results = run.read_results(folder).get(stage, {})
        if "train" not in results:
            continue
        if metric_name not in results.get(split, {}):
            raise UserError(
                f"config.sweep.metric={metric!r} is not in {folder / run.RESULTS}: it has, for "
                f"{stage}, "
                f"{', '.join(f'{s}/{f}' for s, keys in results.items() for f in keys)[:200]}."
            )
        train_metrics = results["train"]
        row["seeds"].append(sweep_run.seed)
        row["values"].append(float(results[split][metric_name]))
        row["particles"].append(train_metrics["particles_per_clip"])
        row["gflops"].append(train_metrics["flops_per_clip"] / 1e9)
        row["seconds"].append(train_metrics["train_seconds"])
        row["clips_per_second"].append(train_metrics["clips_per_second"])
    for row in rows.values():
        row["mean"] = float(np.mean(row["values"])) if row["values"] else None
        row["std"] = float(np.std(row["values"], ddof=1)) if len(row["values"]) > 1 else 0.0
    return rows


def _report(
    experiment: SweepJob, metrics: dict[str, dict[str, Any]], sweep_dir: Path
) -> Iterator[str]:
    spec = experiment.sweep
    finished = {name: row for name, row in metrics.items() if row["values"]}
    yield from (
        f"# {sweep_dir.name}",
        "",
        f"`{spec.metric}` over {len(spec.seeds)} seeds: mean and standard deviation. Costs are of "
        "training: particles and FLOPs are computed from shapes, clips/s and seconds are "
        "measured.",
        "",
    )
    yield from table(
        [
            "run",
            spec.metric,
            "seeds",
            "particles a clip",
            "GFLOP a clip",
            "clips/s",
            "seconds",
            "on the Pareto front",
        ],
        [
            [
                name if row["folder"] == f"runs/{name}" else f"{name} ({row['folder']})",
                f"{row['mean']:.3f} ± {row['std']:.3f}",
                len(row["values"]),
                f"{np.mean(row['particles']):.0f}",
                f"{np.mean(row['gflops']):.2f}",
                f"{np.mean(row['clips_per_second']):.1f}",
                f"{np.mean(row['seconds']):.0f}",
                "yes" if name in pareto_front(finished, "particles") else "",
            ]
            for name, row in finished.items()
        ],
    )
    missing = [name for name, row in metrics.items() if not row["values"]]
    if missing:
        yield from ("", f"No result yet: {', '.join(missing)}.")
    if finished:
        for cost, label in _COSTS.items():
            points = {
                name: (float(np.mean(row[cost])), row["mean"], row["std"])
                for name, row in finished.items()
            }
            plots.pareto(
                points,
                pareto_front(finished, cost),
                sweep_dir / "report" / f"pareto_{cost}.png",
                label,
                spec.metric,
            )
            yield from ("", f"![{spec.metric} against {label}](report/pareto_{cost}.png)")
    yield from ("", "Each run has its own report in [runs](runs).", "")


def pareto_front(metrics: Mapping[str, Mapping[str, Any]], cost: str) -> list[str]:
    """Names on the Pareto front, from cheap to expensive: no cheaper run is at least as good."""
    best, names = -np.inf, []
    for name in sorted(
        metrics,
        key=lambda candidate: (np.mean(metrics[candidate][cost]), -metrics[candidate]["mean"]),
    ):
        if metrics[name]["mean"] > best:
            best = metrics[name]["mean"]
            names.append(name)
    return names
