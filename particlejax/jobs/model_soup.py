# SPDX-License-Identifier: Apache-2.0
"""Combines runs of one architecture: averages their parameters (model soup) or their predictions.

The model is a run in workdir/model with all parameters, however the runs were fine-tuned; with one
run this merges what was trained beside a frozen base.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from particlejax.config import jobs
from particlejax.config.experiment import Experiment
from particlejax.core import io, tree
from particlejax.core.typing import Params, UserError
from particlejax.data import sources
from particlejax.distributed import checkpoint, sharding
from particlejax.finetune import weight_average
from particlejax.reports import markdown
from particlejax.train import eval, predictions
from particlejax.train import stage as run
from particlejax.train.log import say

MODEL = "model"  # folder of the resulting run
_FIGURES = ("top1", "mAP", "r2")  # runs are ranked by the first of these that exists


def model_soup(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'model_soup': evaluates `config.runs` one by one and combined; results.json, report.md,
    model/.
    """
    del name
    if not experiment.runs:
        raise UserError(
            "config.runs is empty: name the runs, as in "
            "--config.runs=\"('runs/a','runs/b:finetune')\"."
        )
    mesh = sharding.make_mesh(experiment.mesh)
    sharding.check_rows(experiment.eval.batch_size, mesh, "config.eval.batch_size")
    kitchen = _Kitchen(
        experiment, workdir, mesh, *_ingredients(experiment, mesh, run.asked(experiment.data))
    )
    each = {label: kitchen.figures(params, label) for label, params in kitchen.params.items()}
    together = _TABLE[experiment.model_soup.method](kitchen, each)
    split = kitchen.stage.data.split
    run.add_results(
        workdir,
        kitchen.stage.name,
        {split: together, "members": {k: _short(v) for k, v in each.items()}},
        kitchen.bad.all(),
    )
    say(f"{experiment.model_soup.method} of {len(each)}: {_short(together)}")
    say(f"report: {markdown.write(workdir)}")


def _ingredients(
    experiment: Experiment, mesh: Any, said: dict[str, Any]
) -> tuple[run.Stage, dict[str, Params]]:
    """The stage, and parameters by run and step. Raises UserError if they are incompatible."""
    stages, found = [], {}
    for text in experiment.runs:
        folder, stage = run.split_run(text)
        steps = checkpoint.whole_steps(run.result_folder(folder, stage))[
            -experiment.model_soup.last_k_checkpoints :
        ]
        if len(steps) < experiment.model_soup.last_k_checkpoints:
            raise UserError(
                f"config.model_soup.last_k_checkpoints={experiment.model_soup.last_k_checkpoints}, "
                f"but {text} has {len(steps)} checkpoints: train it with a larger "
                "config.checkpoint.max_to_keep, or average fewer."
            )
        for step in steps:
            made, params = run.load_trained(text, mesh, said, step)
            stages.append(made)
            found[f"{text}@{step}"] = params
    if stages[0].targets is None:
        raise UserError(
            f"stage {stages[0].name} of {experiment.runs[0]} is not a classifier: name one that "
            "is, as RUN_DIR:STAGE."
        )
    for text, params in found.items():
        weight_average.check(next(iter(found.values())), params, text)
    for text, other in zip(found, stages, strict=True):
        if other.classes != stages[0].classes:
            raise UserError(
                f"{text} has other classes than {experiment.runs[0]}: a soup needs runs with the "
                "same labels."
            )
    return stages[0], found


class _Kitchen:
    """Evaluates parameters on one source; clips are decoded again for each model."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        mesh: Any,
        stage: run.Stage,
        params: dict[str, Params],
    ) -> None:
        self.experiment, self.workdir, self.stage, self.params, self.mesh = (
            experiment,
            workdir,
            stage,
            params,
            mesh,
        )
        self.bad = run.BadClips(stage.data.max_unreadable)
        self.source = sources.open_source(
            stage.data.source, stage.data.split, stage.data.cache_dir, stage.classes
        )
        spec = experiment.eval
        self._views = stage.views(self.source, spec.batch_size, spec.views, spec.scale)
        self._predict = eval.jit_predict(stage.model, mesh, stage.targets.answers)

    def said(self, params: Params, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the clips, and the predictions for them."""
        return eval.probabilities(
            self._predict, params, self._views, self.mesh, self.bad.note, name
        )

    def score(self, numbers: np.ndarray, found: np.ndarray) -> dict[str, Any]:
        """Metrics; predictions.csv holds the last scored predictions."""
        records = [self.source[int(n)] for n in numbers]
        label = np.array([record.label for record in records], int)
        names = [record.name for record in records]
        return predictions.score(
            self.stage.targets,
            self.workdir / "predictions.csv",
            names,
            label,
            found,
            self.stage.classes,
        )

    def figures(self, params: Params, name: str) -> dict[str, Any]:
        """Metrics of one model."""
        return self.score(*self.said(params, name))

    def serve(self, params: Params, names: list[str]) -> dict[str, Any]:
        """Writes the model as a run, and evaluates it."""
        folder, stage = self.workdir / MODEL, self.stage
        plain = replace(stage.spec, init_from="")
        made = replace(
            stage.experiment, stages={stage.name: plain}, stage_order=(stage.name,), init_from=""
        )
        folder.mkdir(exist_ok=True)
        io.write_json(folder / run.CONFIG, jobs.written(made))
        kept = checkpoint.Checkpoints(run.checkpoint_folder(folder, stage.name), 2)
        kept.save(0, {"params": params}, {"classes": list(stage.classes), "of": names})
        kept.close()
        say(
            f"the model: {folder}, {tree.count(params) / 1e6:.2f} M parameters of "
            f"{', '.join(names)}"
        )
        return self.figures(params, "together") | {"of": names}


def _average(kitchen: _Kitchen, each: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return kitchen.serve(weight_average.mean(list(kitchen.params.values())), list(each))


def _greedy(kitchen: _Kitchen, each: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Adds runs, best first, while the average is no worse (arXiv:2203.05482, recipe 1)."""
    order = sorted(each, key=lambda name: -_figure(each[name]))
    chosen, best = order[:1], _figure(each[order[0]])
    for name in order[1:]:
        found = _figure(
            kitchen.figures(
                weight_average.mean([kitchen.params[k] for k in (*chosen, name)]), f"with {name}"
            )
        )
        if found >= best:
            chosen, best = [*chosen, name], found
    return kitchen.serve(weight_average.mean([kitchen.params[name] for name in chosen]), chosen)


def _ensemble(kitchen: _Kitchen, each: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Averages predictions; writes no model."""
    said = [kitchen.said(params, name) for name, params in kitchen.params.items()]
    return kitchen.score(said[0][0], np.mean([found for _, found in said], axis=0)) | {
        "of": list(each)
    }


_TABLE: dict[str, Callable[[_Kitchen, dict[str, dict[str, Any]]], dict[str, Any]]] = {
    "uniform": _average,
    "greedy": _greedy,
    "ensemble": _ensemble,
}


def _figure(figures: dict[str, Any]) -> float:
    return next((figures[key] for key in _FIGURES if key in figures), 0.0)


def _short(figures: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if isinstance(value, int | float)}
