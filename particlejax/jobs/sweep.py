# SPDX-License-Identifier: Apache-2.0
"""Sweeps: several runs of one experiment with different settings; resumable, with a table and
plots.

Every run has its own folder, runs/NAME/SEED, and is an ordinary run. The table is read from these
folders, so it is complete whichever process trained them. Optuna's storage, if set, shares the runs
among processes.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from particlejax.config.experiment import Experiment, as_dict
from particlejax.core import io, tree
from particlejax.core.suggest import did_you_mean
from particlejax.core.typing import UserError
from particlejax.jobs import optuna_sweep
from particlejax.jobs.train import train
from particlejax.reports import plots
from particlejax.reports.markdown import table
from particlejax.train import loop, run_dir
from particlejax.train import stage as run
from particlejax.train.log import say

_COSTS = {
    "particles": "particles a clip",
    "gflops": "training GFLOP a clip",
    "seconds": "seconds of training",
}


class Run(NamedTuple):
    """One run of a sweep."""

    name: str
    seed: int
    experiment: Experiment

    def folder(self, top: Path) -> Path:
        """The run's folder."""
        return top / "runs" / self.name / f"seed{self.seed}"


def sweep(experiment: Experiment, top: Path, name: str) -> None:
    """Job 'sweep': all runs of config.sweep, or config.sweep.num_trials trials; results.json,
    report.md.
    """
    del name
    spec = experiment.sweep
    if not spec.runs:
        raise UserError("config.sweep.runs is empty: give runs, each a name with its settings.")
    runs = plan(experiment)  # check all runs before the first starts
    _check_metric(runs, spec.metric)
    if spec.num_trials:
        runs = _search(experiment, top)
    elif spec.storage:
        names = [f"{each.name}/seed{each.seed}" for each in runs]
        optuna_sweep.each(spec.storage, str(top.absolute()), names, lambda i: _one(runs[i], top))
    else:
        for i, each in enumerate(runs):
            say(f"sweep: run {i + 1} of {len(runs)}, {each.name}, seed {each.seed}")
            _one(each, top)
    figures = collect(runs, spec.metric, top)
    run.add_results(top, "sweep", figures, {})
    io.write_text(top / "report.md", "\n".join(_report(experiment, figures, top)))
    say(f"report: {top / 'report.md'}")
    failed = [f"{key} ({row['error']})" for key, row in figures.items() if row["error"]]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(figures)} have failed runs: {'; '.join(failed[:3])}: fix the "
            "cause and run the same command again."
        )


def _check_metric(runs: list[Run], metric: str) -> None:
    """Raises UserError if a run will not have the metric of the sweep."""
    parts = metric.split("/", 2)
    if len(parts) < 3:
        raise UserError(f"config.sweep.metric={metric!r}: write it as stage/split/figure.")
    name, split, figure = parts
    for made in runs:
        stages = made.experiment.stages
        if name not in stages:
            raise UserError(
                f"config.sweep.metric={metric!r} is of stage {name!r}, which run {made.name} does "
                f"not have: {did_you_mean(name, stages)}"
            )
        known = loop.figures_of(made.experiment, name)
        if split not in known:
            raise UserError(
                f"config.sweep.metric={metric!r} is of split {split!r}, which stage {name} does "
                f"not measure: {did_you_mean(split, known)}"
            )
        if known[split] and figure not in known[split]:
            raise UserError(
                f"config.sweep.metric={metric!r} is not measured: "
                f"{did_you_mean(figure, known[split])}"
            )


def plan(experiment: Experiment) -> list[Run]:
    """All runs, ordered by seed, so that a stopped sweep has complete seeds. Raises UserError if
    one is invalid.
    """
    spec = experiment.sweep
    return [
        _run(experiment, name, changes, seed)
        for seed, (name, changes) in itertools.product(spec.seeds, spec.runs.items())
    ]


def _run(experiment: Experiment, name: str, changes: Mapping[str, Any], seed: int) -> Run:
    settings = as_dict(dataclasses.replace(experiment, job="train", seed=seed))
    del settings["sweep"]
    return Run(name, seed, Experiment.of(_merged(settings, changes)))


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    inner = {
        key: _merged(settings.get(key) or {}, value)
        for key, value in changes.items()
        if isinstance(value, Mapping)
    }
    return {**settings, **changes, **inner}


def _search(experiment: Experiment, top: Path) -> list[Run]:
    """Trials that combine all values which each differing setting has in any of the runs."""
    spec = experiment.sweep
    space: dict[str, list[Any]] = {}
    for changes in spec.runs.values():
        for key, value in _flat(changes):
            if value not in space.setdefault(key, []):
                space[key].append(value)

    def trial(chosen: dict[str, Any], number: int) -> Run:
        return _run(experiment, f"trial{number:03d}", tree.nest(chosen), spec.seeds[0])

    def measure(chosen: dict[str, Any], number: int) -> float:
        made = trial(chosen, number)
        _one(made, top)
        row = collect([made], spec.metric, top)[made.name]
        if row["error"]:
            raise UserError(row["error"])
        return row["mean"]

    tried = optuna_sweep.search(
        spec.storage or str(top.absolute() / "search.journal"),
        str(top.absolute()),
        spec.num_trials,
        experiment.seed,
        space,
        measure,
    )
    began = {
        number: chosen
        for number, chosen in tried.items()
        if (top / "runs" / f"trial{number:03d}").exists()
    }
    # the others had incompatible settings
    return [trial(chosen, number) for number, chosen in began.items()]


def _flat(changes: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{key}/")
        else:
            yield f"{where}{key}", value


def _one(each: Run, top: Path) -> Path:
    """Trains or resumes one run; a UserError is written to error.txt in its folder."""
    folder = each.folder(top)
    stages = run.read_results(folder)
    if all("train" in stages.get(stage, {}) for stage in each.experiment.stages):
        say(f"{folder}: already done")
        return folder
    run_dir.enter(folder, each.experiment)
    error = folder / "error.txt"
    error.unlink(missing_ok=True)
    try:
        train(each.experiment, folder, f"{each.name}-seed{each.seed}")
    except UserError as problem:
        say(f"{folder}: {problem}")
        error.write_text(str(problem), encoding="utf-8")
    return folder


def collect(runs: list[Run], metric: str, top: Path) -> dict[str, dict[str, Any]]:
    """For each name the figures of all finished seeds, with mean and standard deviation."""
    stage, split, figure = metric.split("/", 2)
    found: dict[str, dict[str, Any]] = {}
    for each in runs:
        row = found.setdefault(
            each.name,
            {
                "seeds": [],
                "values": [],
                "error": "",
                **{key: [] for key in _COSTS},
                "clips_per_second": [],
            },
        )
        folder = each.folder(top)
        if (folder / "error.txt").exists():
            row["error"] = (folder / "error.txt").read_text(encoding="utf-8")
        results = run.read_results(folder).get(stage, {})
        if "train" not in results:
            continue
        if figure not in results.get(split, {}):
            raise UserError(
                f"config.sweep.metric={metric!r} is not in {folder / run.RESULTS}: it has, for "
                f"{stage}, "
                f"{', '.join(f'{s}/{f}' for s, each in results.items() for f in each)[:200]}."
            )
        train_figures = results["train"]
        row["seeds"].append(each.seed)
        row["values"].append(float(results[split][figure]))
        row["particles"].append(train_figures["particles_per_clip"])
        row["gflops"].append(train_figures["flops_per_clip"] / 1e9)
        row["seconds"].append(train_figures["train_seconds"])
        row["clips_per_second"].append(train_figures["clips_per_second"])
    for row in found.values():
        row["mean"] = float(np.mean(row["values"])) if row["values"] else None
        row["std"] = float(np.std(row["values"], ddof=1)) if len(row["values"]) > 1 else 0.0
    return found


def _report(experiment: Experiment, figures: dict[str, dict[str, Any]], top: Path) -> Iterator[str]:
    spec = experiment.sweep
    done = {name: row for name, row in figures.items() if row["values"]}
    yield from (
        f"# {top.name}",
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
                name,
                f"{row['mean']:.3f} ± {row['std']:.3f}",
                len(row["values"]),
                f"{np.mean(row['particles']):.0f}",
                f"{np.mean(row['gflops']):.2f}",
                f"{np.mean(row['clips_per_second']):.1f}",
                f"{np.mean(row['seconds']):.0f}",
                "yes" if name in front(done, "particles") else "",
            ]
            for name, row in done.items()
        ],
    )
    missing = [name for name, row in figures.items() if not row["values"]]
    if missing:
        yield from ("", f"No result yet: {', '.join(missing)}.")
    if done:
        for cost, label in _COSTS.items():
            points = {
                name: (float(np.mean(row[cost])), row["mean"], row["std"])
                for name, row in done.items()
            }
            plots.pareto(
                points, front(done, cost), top / "report" / f"pareto_{cost}.png", label, spec.metric
            )
            yield from ("", f"![{spec.metric} against {label}](report/pareto_{cost}.png)")
    yield from ("", "Each run has its own report in [runs](runs).", "")


def front(figures: Mapping[str, Mapping[str, Any]], cost: str) -> list[str]:
    """Names on the Pareto front, from cheap to expensive: no cheaper run is at least as good."""
    best, found = -np.inf, []
    for name in sorted(
        figures, key=lambda each: (np.mean(figures[each][cost]), -figures[each]["mean"])
    ):
        if figures[name]["mean"] > best:
            best = figures[name]["mean"]
            found.append(name)
    return found
