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
from particlejax.config.job_specs import ModelSoupJob
from particlejax.core import io, tree
from particlejax.core.typing import Params, UserError
from particlejax.data import sources
from particlejax.distributed import checkpoint, sharding
from particlejax.finetune import weight_average
from particlejax.reports import markdown
from particlejax.train import eval, predictions
from particlejax.train import stage as run
from particlejax.train.log import log_info

MODEL = "model"  # folder of the resulting run
_RANKING_METRICS = ("top1", "mAP", "r2")  # runs are ranked by the first of these that exists


def model_soup(experiment: ModelSoupJob, workdir: Path, name: str) -> None:
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
    members = _Members(
        experiment,
        workdir,
        mesh,
        *_load_members(experiment, mesh, run.data_overrides(experiment.data)),
    )
    member_metrics = {
        label: members.evaluate(params, label) for label, params in members.params.items()
    }
    soup_metrics = _METHODS[experiment.model_soup.method](members, member_metrics)
    split = members.stage.data.split
    run.add_results(
        workdir,
        members.stage.name,
        {
            split: soup_metrics,
            "members": {label: _scalars(metrics) for label, metrics in member_metrics.items()},
        },
        members.unreadable.gather_all(),
    )
    log_info(f"{experiment.model_soup.method} of {len(member_metrics)}:")
    for line in markdown.headlines({members.stage.name: {split: soup_metrics}}):
        log_info(line)
    markdown.write_report(workdir)


def _load_members(
    experiment: ModelSoupJob, mesh: Any, overrides: dict[str, Any]
) -> tuple[run.Stage, dict[str, Params]]:
    """The stage, and parameters by run and step. Raises UserError if they are incompatible."""
    stages, params_by_label = [], {}
    for text in experiment.runs:
        folder, stage = run.split_run(text)
        steps = checkpoint.valid_steps(run.result_folder(folder, stage))[
            -experiment.model_soup.last_k_checkpoints :
        ]
        if len(steps) < experiment.model_soup.last_k_checkpoints:
            raise UserError(
                f"config.model_soup.last_k_checkpoints={experiment.model_soup.last_k_checkpoints}, "
                f"but {text} has {len(steps)} checkpoints: train it with a larger "
                "config.checkpoint.max_to_keep, or average fewer."
            )
        for step in steps:
            loaded_stage, params = run.load_trained(text, mesh, overrides, step)
            stages.append(loaded_stage)
            params_by_label[f"{text}@{step}"] = params
    if stages[0].targets is None:
        raise UserError(
            f"stage {stages[0].name} of {experiment.runs[0]} is not a classifier: name one that "
            "is, as RUN_DIR:STAGE."
        )
    for text, params in params_by_label.items():
        weight_average.check_same_architecture(next(iter(params_by_label.values())), params, text)
    for text, member_stage in zip(params_by_label, stages, strict=True):
        if member_stage.classes != stages[0].classes:
            raise UserError(
                f"{text} has other classes than {experiment.runs[0]}: a soup needs runs with the "
                "same labels."
            )
    return stages[0], params_by_label


class _Members:
    """Evaluates parameters on one source; clips are decoded again for each model."""

    def __init__(
        self,
        experiment: ModelSoupJob,
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
        self.unreadable = run.UnreadableClips(stage.data.max_unreadable)
        self.source = sources.open_split(stage.data, classes=stage.classes)
        spec = experiment.eval
        self._views = stage.eval_batches(self.source, spec.batch_size, spec.views, spec.scale)
        self._predict = eval.jit_predict(stage.model, mesh, stage.targets.activate)

    def predict(self, params: Params, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the clips, and the predictions for them."""
        return eval.predict_probabilities(
            self._predict, params, self._views, self.mesh, self.unreadable.record, name
        )

    def score(self, clip_indices: np.ndarray, probs: np.ndarray) -> dict[str, Any]:
        """Metrics; predictions.csv holds the last scored predictions."""
        records = [self.source[int(index)] for index in clip_indices]
        label = np.array([record.label for record in records], int)
        names = [record.name for record in records]
        return predictions.score_predictions(
            self.stage.targets,
            self.workdir / "predictions.csv",
            names,
            label,
            probs,
            self.stage.classes,
        )

    def evaluate(self, params: Params, name: str) -> dict[str, Any]:
        """Metrics of one model."""
        return self.score(*self.predict(params, name))

    def write_model(self, params: Params, names: list[str]) -> dict[str, Any]:
        """Writes the model as a run, and evaluates it."""
        folder, stage = self.workdir / MODEL, self.stage
        stage_spec = replace(stage.spec, init_from="")
        model_experiment = replace(
            stage.experiment,
            stages={stage.name: stage_spec},
            stage_order=(stage.name,),
            init_from="",
        )
        folder.mkdir(exist_ok=True)
        io.write_json(folder / run.CONFIG, jobs.written(model_experiment))
        checkpoints = checkpoint.Checkpoints(run.checkpoint_folder(folder, stage.name), 2)
        checkpoints.save(
            0,
            {"params": params},
            {"classes": list(stage.classes), "outputs": list(stage.targets.names), "of": names},
        )
        checkpoints.close()
        log_info(
            f"the model: {folder}, {tree.count(params) / 1e6:.2f} M parameters of "
            f"{', '.join(names)}"
        )
        return self.evaluate(params, "together") | {"of": names}


def _average(members: _Members, member_metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return members.write_model(
        weight_average.mean_params(list(members.params.values())), list(member_metrics)
    )


def _greedy(members: _Members, member_metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Adds runs, best first, while the average is no worse (arXiv:2203.05482, recipe 1)."""
    order = sorted(member_metrics, key=lambda name: -_ranking_value(member_metrics[name]))
    selected, best = order[:1], _ranking_value(member_metrics[order[0]])
    for name in order[1:]:
        candidate = _ranking_value(
            members.evaluate(
                weight_average.mean_params(
                    [members.params[member] for member in (*selected, name)]
                ),
                f"with {name}",
            )
        )
        if candidate >= best:
            selected, best = [*selected, name], candidate
    return members.write_model(
        weight_average.mean_params([members.params[name] for name in selected]), selected
    )


def _ensemble(members: _Members, member_metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Averages predictions; writes no model."""
    predictions = [members.predict(params, name) for name, params in members.params.items()]
    return members.score(
        predictions[0][0], np.mean([probs for _, probs in predictions], axis=0)
    ) | {"of": list(member_metrics)}


_METHODS: dict[str, Callable[[_Members, dict[str, dict[str, Any]]], dict[str, Any]]] = {
    "uniform": _average,
    "greedy": _greedy,
    "ensemble": _ensemble,
}


def _ranking_value(metrics: dict[str, Any]) -> float:
    return next((metrics[key] for key in _RANKING_METRICS if key in metrics), 0.0)


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}
