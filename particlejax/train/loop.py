# SPDX-License-Identifier: Apache-2.0
"""The training loop: runs a stage from its start, or its last checkpoint, to its lines in
results.json.
"""

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from particlejax.config.experiment import Experiment
from particlejax.config.job_specs import EvaluateJob
from particlejax.config.training import EvalSpec
from particlejax.core import tree
from particlejax.core.typing import Metrics, UserError
from particlejax.data import pipeline, sources
from particlejax.data.packing_plan import PlanState
from particlejax.distributed import cluster, sharding
from particlejax.distributed.checkpoint import Checkpoints
from particlejax.finetune import partition, restore
from particlejax.particles.types import Batch
from particlejax.train import codebook, eval, optim, predictions, pretrained
from particlejax.train import stage as run
from particlejax.train.log import MetricLog, Progress, log_info
from particlejax.train.nan_guard import NanGuard
from particlejax.train.setup import Setup, set_up
from particlejax.train.telemetry import Profiler, RecompileWarning, StepTimer, peak_flops
from particlejax.train.train_state import TrainState, as_abstract, without_frozen


class Stopped(Exception):
    """The run received a stop signal; everything is saved."""


@dataclass
class Context:
    """State shared by all stages of a run. `stop_signal` names the stop signal received, '' if
    none.
    """

    experiment: Experiment | EvaluateJob
    workdir: Path
    mesh: Mesh
    log: MetricLog
    stop_signal: str = ""
    sync_count: int = 0  # number of checks for a stop signal, equal in all processes

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C request a stop; a second Ctrl-C stops at once.

        With several processes JAX handles SIGTERM and forwards it to all of them; Ctrl-C raises
        SIGTERM.
        """

        def request_stop(number: int, frame: Any) -> None:
            del frame
            if self.stop_signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = signal.Signals(number).name
            if cluster.is_multiprocess():
                os.kill(os.getpid(), signal.SIGTERM)

        handled_signals = (
            (signal.SIGINT,) if cluster.is_multiprocess() else (signal.SIGTERM, signal.SIGINT)
        )
        previous_handlers = {
            number: signal.signal(number, request_stop) for number in handled_signals
        }
        try:
            yield
        finally:
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)

    def should_stop(self) -> bool:
        """Whether to stop here; with several processes, all of them agree on the step."""
        self.sync_count += 1
        if cluster.is_multiprocess() and multihost_utils.reached_preemption_sync_point(
            self.sync_count
        ):
            self.stop_signal = self.stop_signal or "SIGTERM"
            return True
        return bool(self.stop_signal) and not cluster.is_multiprocess()


def train(context: Context) -> None:
    """Runs all stages missing from results.json, in order. Raises Stopped after saving, and
    UserError if there is no stage or one has nothing to start from.
    """
    if not context.experiment.stages:
        raise UserError(
            "config.stages is empty: give an experiment file with a stage to train, such as "
            "experiments/finetune.py."
        )
    run.check_init_from(context.experiment, context.workdir)
    for name in context.experiment.stages:
        if _is_done(context, name):
            log_info(f"{name}: already done, see {context.workdir / run.RESULTS}")
            continue
        _train_stage(context, name)


def _is_done(context: Context, name: str) -> bool:
    """Whether results.json has the stage's figures, those of every split that is asked for."""
    results = run.read_results(context.workdir).get(name, {})
    classifies = "classify" in context.experiment.stages[name].objectives
    wanted = context.experiment.eval.splits if classifies else ()
    return "train" in results and all(split in results for split in wanted)


@dataclass
class _Position:
    """Position of a run: exactly what its checkpoints hold.

    base: reference to the frozen parameters, if the checkpoint does not hold them. counts: of the
    steps so far, by all sessions.
    """

    state: TrainState
    done: int
    bad: run.UnreadableClips
    base: dict[str, Any]
    counts: "_Counts"


@dataclass
class _Counts:
    """What the steps of a stage have taken, in this session and all before it.

    seconds: of earlier sessions. clips: that this process's steps have read; those of earlier
    sessions are counted by the first process. unreadable: names of clips that no step could read.
    """

    seconds: float = 0.0
    clips: int = 0
    unreadable: set[str] = field(default_factory=set)
    start: float = field(default_factory=lambda: time.monotonic())

    @classmethod
    def restored(cls, data: Mapping[str, Any], clips: int) -> "_Counts":
        """From a checkpoint's data; `clips` are those of an older version's checkpoint."""
        saved = data.get("counts", {"seconds": 0.0, "clips": clips, "unreadable": []})
        own = saved["clips"] if cluster.is_primary() else 0
        return cls(saved["seconds"], own, set(saved["unreadable"]))

    def record(self, loaded: pipeline.LoadedBatch) -> None:
        """Counts the clips of a batch that a step takes."""
        self.clips += int((loaded.batch.clip_index >= 0).sum())
        self.unreadable |= {clip.name for clip in loaded.unreadable}

    def gather_all(self, part: int) -> dict[str, Any]:
        """The counts of all processes; every process must call it.

        part: of each batch that this process reads; processes that read the same part count once.
        """
        own = {"part": part, "clips": self.clips, "unreadable": sorted(self.unreadable)}
        counts = cluster.gather_json(own)
        clips = {other["part"]: other["clips"] for other in reversed(counts)}
        return {
            "seconds": self.seconds + time.monotonic() - self.start,
            "clips": sum(clips.values()),
            "unreadable": sorted({name for other in counts for name in other["unreadable"]}),
        }


@dataclass(frozen=True)
class _Store:
    """The checkpoints of a stage: the latest ones and the best one."""

    latest: Checkpoints
    best: Checkpoints

    @classmethod
    def open(cls, context: Context, name: str) -> "_Store":
        """Opens both checkpoint folders of a stage."""
        folder = run.checkpoint_folder(context.workdir, name)
        keep = context.experiment.checkpoint.max_to_keep
        return cls(Checkpoints(folder, keep), Checkpoints(folder.with_name("best"), 2))


def _train_stage(context: Context, name: str) -> None:
    """Trains and evaluates one stage and writes its results."""
    setup = set_up(context.experiment, name, context.mesh)
    store = _Store.open(context, name)
    position, batches = _restore(context, setup, store)
    _announce(setup, position)
    loop = _Loop(context, setup, store, position, batches)
    with context.signals(), closing(store.best), closing(store.latest):
        loop.steps()
        loop.save()
        store.best.finish()
        store.latest.finish()
        _write_figures(loop)


def _restore(
    context: Context, setup: Setup, store: _Store
) -> tuple[_Position, pipeline.TrainBatches]:
    """The position to continue from, and the batches that follow."""
    state, unreadable = setup.init_state(), run.UnreadableClips(setup.stage.data.max_unreadable)
    _check_classes(setup, store.latest.read_data())
    restored = store.latest.restore(as_abstract(without_frozen(state)))
    batches = setup.batches
    if restored:
        done, kept, data = restored
        base = {restore.BASE_KEY: data[restore.BASE_KEY]} if restore.BASE_KEY in data else {}
        frozen = _initialize(context, setup, state, base)[0].frozen if base else ()
        unreadable.reasons.update(data["bad"])
        counts = _Counts.restored(data, batches.plan.clips_before(done))
        position = _Position(replace(kept, frozen=frozen), done, unreadable, base, counts)
        batches = replace(batches, start_state=PlanState.from_json(data["stand"]))
    else:
        state = codebook.fit_codebook(state, setup.stage, batches)
        state, base = _initialize(context, setup, state, {})
        position = _Position(state, 0, unreadable, base, _Counts())
    store.best.delete_after(position.done)
    stages = list(context.experiment.stages)
    later = tuple(stages[stages.index(setup.name) + 1 :])
    context.log.truncate(setup.name, position.done, later)
    return position, batches


def _check_classes(setup: Setup, data: dict[str, Any]) -> None:
    """Raises UserError if the head that a resumed stage has trained is of other classes."""
    saved = tuple(data.get("outputs", ()))
    if setup.stage.targets and saved and saved != setup.stage.targets.names:
        changed = sorted(set(saved) ^ set(setup.stage.targets.names)) or saved
        raise UserError(
            f"{setup.name} was trained on other classes of {setup.stage.data.source} than it has "
            f"now (changed: {', '.join(changed[:5])}): restore the labels, or use another "
            "--workdir."
        )


def _initialize(
    context: Context, setup: Setup, state: TrainState, base: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """The initialized state, and the reference to the base run if checkpoints omit the frozen
    parameters; `base`: that reference if the run is resumed.
    """
    name, tuning = setup.name, setup.stage.spec.finetune
    folder = run.find_init(context.experiment, name, context.workdir)
    if folder is None and tuning.method != "full":
        raise UserError(
            f"config.stages.{name}.finetune.method={tuning.method!r} freezes the encoder, but "
            "no pretrained run is given: set config.init_from, or the stage's init_from to "
            "an earlier stage."
        )
    if folder is None:
        return pretrained.with_stem_weights(state, setup.stage), {}
    reference = base
    if tuning.method != "full":
        own_folder = run.checkpoint_folder(context.workdir, name)
        reference = base or {restore.BASE_KEY: restore.reference(folder, own_folder, tuning)}
        folder = restore.base_folder(own_folder, reference[restore.BASE_KEY])
    targets = setup.stage.targets
    start, summary = restore.from_checkpoint(
        partition.base_params(state.params, state.frozen),
        folder,
        outputs=targets.names if targets else None,
    )
    log_info(f"{name}: {'builds on' if base else 'loaded'} {summary}")
    params, frozen = partition.replace_values(state.params, state.frozen, start)
    average = jax.tree.map(lambda x: x.copy(), params) if setup.stage.spec.ema_decay else ()
    return replace(state, params=params, average=average, frozen=frozen), reference


def _announce(setup: Setup, position: _Position) -> None:
    tuning, state = setup.stage.spec.finetune, position.state
    trained = partition.count_trainable(tuning, state.params)
    total = tree.count((state.params, state.frozen))
    part = f" ({trained / 1e6:.3g} M trainable: {tuning.method})" if trained < total else ""
    measured = {"val": setup.val} if setup.val else {}
    if "classify" in setup.stage.spec.objectives:
        splits = setup.stage.experiment.eval.splits
        measured |= {split: setup.open(split, "") for split in splits if split != "val"}
    counts = ", ".join(f"{len(source)} of {split}" for split, source in measured.items())
    log_info(
        f"{setup.name}: {setup.clips} clips to train on"
        + (f", {counts} to measure" if counts else "")
        + (f", {len(setup.stage.classes)} classes" if setup.stage.classes else "")
    )
    per_step = setup.batches.plan.clips_before(setup.steps) / setup.steps
    log_info(
        f"{setup.name}: {total / 1e6:.2f} M parameters{part}, {setup.clips} clips, {setup.steps} "
        f"steps of {per_step:.4g} clips"
        + (f", continuing at step {position.done}" if position.done else "")
    )


class _Loop:
    """The steps of one stage: read `steps` from top to bottom, the rest are its helpers."""

    def __init__(
        self,
        context: Context,
        setup: Setup,
        store: _Store,
        position: _Position,
        batches: pipeline.TrainBatches,
    ) -> None:
        self.context, self.setup, self.store = context, setup, store
        self.position, self.batches = position, batches
        experiment, stage = context.experiment, setup.stage
        self.finite = NanGuard(context.workdir, setup.name, experiment.on_nan, self._clip_names)
        peak = peak_flops(experiment.log.peak_flops, experiment.model_of(stage.spec).dtype)
        self.views = stage.eval_batches(setup.val, stage.spec.batch_size) if setup.val else None
        self.gauge = StepTimer(setup.operations, peak, stage.process_slice[1])
        # (step, metrics) in flight: read one step late, so that the device never waits
        self.pending: tuple[int, Any] | None = None

    def steps(self) -> None:
        """Takes all remaining steps; evaluates and saves in between."""
        context, setup, position = self.context, self.setup, self.position
        experiment = context.experiment
        if self._is_due(position.done) and not self._is_measured(position.done):
            self._measure()  # a stop interrupted the evaluation
        if self._is_patience_over():
            return
        stream = pipeline.read_batches(self.batches, position.done, setup.steps, setup.stage.data)
        progress = Progress(setup.name, setup.steps, position.done)
        trace = Profiler(context.workdir, experiment.profile_steps)
        compilations = RecompileWarning(setup.name, setup.step)
        loss = None  # of the most recently started step
        self.gauge.reset()
        try:
            while position.done < setup.steps and not self._is_patience_over():
                with self.gauge.measure_time("data", skip_if=partial(_is_running, loss)):
                    loaded = self._next(stream)
                position.bad.record(loaded)
                position.counts.record(loaded)
                trace.before_step(position.done + 1)
                metrics = self._step(loaded.batch)
                position.done += 1
                loss = metrics["loss"] if metrics else loss
                compilations.check(position.done)
                self.finite.check()  # of the previous step
                if metrics:
                    self.finite.record(position.done, metrics.pop("finite"))
                note = self._flush()
                self.gauge.add_batch(loaded.batch)
                trace.after_step(position.done, loss)
                last = position.done == setup.steps
                if metrics and (position.done % experiment.log.every_steps == 0 or last):
                    self.pending = (position.done, metrics)
                progress.update(note)
                if self._is_due(position.done):
                    self.finite.check()
                    self._flush()
                    self._measure()
                if position.done % experiment.checkpoint.save_interval_steps == 0 or last:
                    self.save()
                self._stop_if_told()
        finally:
            stream.close()
            progress.close()
            trace.stop(loss)
        if not int(position.state.step):
            raise UserError(
                f"{setup.name}: no step was taken, because none of its clips can be read: check "
                "the paths and the files; experiments/check_data.py lists every reason."
            )

    def _step(self, batch: Batch) -> Metrics | None:
        """Takes one step; skips a batch without clips and returns None."""
        # several processes do not know each other's rows: there, the step itself keeps its state
        if not cluster.is_multiprocess() and (batch.clip_index < 0).all():
            log_info(
                f"{self.setup.name}: no clip of step {self.position.done + 1} can be read, so the "
                "step is skipped."
            )
            return None
        self.position.state, metrics = self.setup.step(
            self.position.state, sharding.shard_batch(batch, self.context.mesh)
        )
        return metrics

    def _next(self, stream: Iterator[pipeline.LoadedBatch]) -> pipeline.LoadedBatch:
        try:
            return next(stream)
        except UserError:  # a decoding worker was killed: save the training done so far
            if (
                not cluster.is_multiprocess()
            ):  # other processes do not know, and saving needs all of them
                self.save()
            raise

    def _stop_if_told(self) -> None:
        """Saves and raises Stopped if a stop was requested."""
        if self.context.should_stop():
            self.save()
            self.store.latest.finish()
            raise Stopped(
                f"{self.context.stop_signal}: {self.setup.name} is saved at step "
                f"{self.position.done} of {self.setup.steps}; the same command continues from "
                "there."
            )

    def _flush(self) -> str:
        """Writes the pending metrics; returns a note for the progress bar."""
        if self.pending is None:
            return ""
        (step, metrics), self.pending = self.pending, None
        setup, log = self.setup, self.context.log
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values["learning_rate"] = float(
            optim.learning_rate_schedule(setup.stage.spec.optim, setup.steps)(step - 1)
        )
        log.write(setup.name, step, "train", values)
        log.write_timing(setup.name, step, self.gauge.summarize())
        return f"loss {values['loss']:.4f}"

    def _clip_names(self, step: int) -> list[str]:
        return [self.setup.source[number].name for number in self.batches.clip_indices(step - 1)]

    def save(self) -> None:
        """Saves the state, which is finite, and all that is needed to resume from it."""
        self.finite.check()
        self._flush()
        with self.gauge.measure_time("save"):
            # evaluate first: a run resumed from this step does not repeat that evaluation
            self.store.best.finish()
            self.store.latest.save(
                self.position.done, without_frozen(self.position.state), self._data()
            )

    def _data(self) -> dict[str, Any]:
        targets = self.setup.targets
        return {
            "stand": self.batches.plan.data_state(self.position.done),
            "seed": self.context.experiment.seed,
            "bad": self.position.bad.gather_all(),
            "counts": self.position.counts.gather_all(self.setup.stage.process_slice[0]),
            "classes": list(self.setup.stage.classes),
            "outputs": list(targets.names) if targets else [],
            "weights": targets.weights if targets else {},
            **self.position.base,
        }

    # -- evaluation during training

    def _is_due(self, step: int) -> bool:
        if self.setup.val is None or step == 0:
            return False
        return step == self.setup.steps or step % self.setup.val_every == 0

    def _is_measured(self, step: int) -> bool:
        lines = self.context.log.read_metrics(self.setup.name, "val")
        return any(line["step"] == step for line in lines)

    def _measure(self) -> None:
        with self.gauge.measure_time("measure"):
            self._measure_now()

    def _measure_now(self) -> None:
        setup, position = self.setup, self.position
        params = setup.eval_params(position.state)
        values = eval.evaluate_metrics(
            setup.evaluation, params, self.views, self.context.mesh, self.watch
        )
        self.context.log.write(setup.name, position.done, "val", values)
        if math.isnan(values.get(setup.stage.spec.best_metric, 0.0)):
            log_info(
                f"{setup.name}: {setup.stage.spec.best_metric} is NaN at step {position.done} and "
                f"is never the best: no clip of {setup.stage.spec.val_split} has what it "
                "measures, or the model diverged."
            )
        if self.selected() and self._best_step() == position.done:
            self.store.best.save(position.done, without_frozen(position.state), self._data())

    def watch(self, loaded: pipeline.LoadedBatch) -> None:
        """Records unreadable clips during evaluation, and stops on request."""
        self.position.bad.record(loaded)
        self._stop_if_told()

    def selected(self) -> list[tuple[float, int]]:
        """(value, step) of every evaluation of the selected metric but NaN; larger is better."""
        spec = self.setup.stage.spec
        lines = self.context.log.read_metrics(self.setup.name, "val") if spec.best_metric else []
        sign = 1.0 if spec.best_mode == "max" else -1.0
        measured = [(sign * float(line[spec.best_metric]), line["step"]) for line in lines]
        return [(value, step) for value, step in measured if not math.isnan(value)]

    def _best_step(self) -> int:
        return max(self.selected(), key=lambda measured: (measured[0], -measured[1]))[1]

    def _is_patience_over(self) -> bool:
        values, spec = self.selected(), self.setup.stage.spec
        if not (spec.early_stopping_patience and values):
            return False
        if sum(step > self._best_step() for _, step in values) < spec.early_stopping_patience:
            return False
        log_info(
            f"{self.setup.name}: {spec.best_metric} has not improved in "
            f"{spec.early_stopping_patience} evaluations, stopping at step "
            f"{self.position.done}"
        )
        return True


def _is_running(result: Any) -> bool:
    """Whether the device is still computing `result`; False if it is None."""
    return result is not None and not result.is_ready()


# -- after the last step


def _write_figures(loop: _Loop) -> None:
    """Evaluates the result on the splits of config.eval and writes results.json."""
    context, setup, position = loop.context, loop.setup, loop.position
    name, state, stage = setup.name, position.state, setup.stage
    last = {split: context.log.read_metrics(name, split)[-1:] for split in ("train", "val")}
    figures: dict[str, Any] = {
        split: _metric_values(lines[0]) for split, lines in last.items() if lines
    }
    counts = position.counts.gather_all(stage.process_slice[0])
    figures["train"] = figures.get("train", {}) | {
        "steps": position.done,
        "wall_seconds": round(counts["seconds"], 1),
        "clips_seen": counts["clips"],
        "num_clips": setup.clips - len(counts["unreadable"]),
        "num_params": tree.count(partition.base_params(state.params, state.frozen)),
        "num_trainable_params": partition.count_trainable(stage.spec.finetune, state.params),
        "num_saved_params": tree.count(without_frozen(state).eval_params),
        "compilations": setup.step._cache_size(),
        **_costs(context, setup, position.done, counts["clips"]),
    }
    if "classify" in stage.spec.objectives:
        params = _result_params(loop)
        for split in context.experiment.eval.splits:
            classification = evaluate_classification(
                stage,
                params,
                setup.open(split, "config.eval.splits"),
                context,
                f"{name}_{split}",
                loop.watch,
            )
            figures[split] = figures.get(split, {}) | classification
    run.add_results(context.workdir, name, figures, position.bad.gather_all())
    # the other processes read what the first one has written
    cluster.barrier(f"{name} is done")


def _costs(context: Context, setup: Setup, done: int, clips: int) -> dict[str, float]:
    """Training costs: timings are medians over the whole run, resumed or not; FLOPs follow from
    shapes.
    """
    lines = context.log.read_timings(setup.name)
    if not lines:
        return {}
    columns = {
        key: [line[key] for line in lines if key in line]
        for key in (
            "seconds_per_step",
            "clips_per_second",
            "data_wait_fraction",
            "packing_efficiency",
            "mfu",
        )
    }
    medians = {key: float(np.median(values)) for key, values in columns.items() if values}
    return {
        "train_seconds": medians.pop("seconds_per_step") * done,
        **medians,
        "particles_per_clip": float(
            np.average(
                [line["particles_per_clip"] for line in lines],
                weights=[max(line.get("num_clips", 1), 1e-9) for line in lines],
            )
        ),
        "flops_per_clip": setup.operations() * done / max(clips, 1),
    }


def _result_params(loop: _Loop) -> Any:
    """The parameters of the stage's result: the best if a metric is selected, else the last."""
    setup, state = loop.setup, loop.position.state
    restored = (
        loop.store.best.restore(as_abstract(without_frozen(state))) if loop.selected() else None
    )
    return setup.eval_params(replace(restored[1], frozen=state.frozen) if restored else state)


def evaluate_classification(
    stage: run.Stage,
    params: Any,
    source: sources.Source,
    context: Context,
    name: str,
    on_batch: eval.BatchCallback,
) -> dict[str, Any]:
    """Metrics over all views of a source; writes class probabilities to predictions_NAME.csv."""
    path = context.workdir / (f"predictions_{name}.csv" if name else "predictions.csv")
    spec = context.experiment.eval
    return score(
        stage,
        params,
        source,
        context.mesh,
        spec,
        on_batch,
        name,
        path if cluster.is_primary() else None,
    )


def score(
    stage: run.Stage,
    params: Any,
    source: sources.Source,
    mesh: Mesh,
    spec: EvalSpec,
    watch: eval.BatchCallback,
    name: str,
    path: Path | None,
) -> dict[str, Any]:
    """Like `evaluate_classification`, with the CSV at `path` (None: no CSV)."""
    sharding.check_rows(spec.batch_size, mesh, "config.eval.batch_size")
    views = stage.eval_batches(source, spec.batch_size, spec.views, spec.scale)
    predict = eval.jit_predict(stage.model, mesh, stage.targets.activate)
    clip_indices, probs = eval.predict_probabilities(
        predict, params, views, mesh, watch, f"evaluate {name}".strip()
    )
    records = [source[int(index)] for index in clip_indices]
    label = np.array([record.label for record in records], int)
    names = [record.name for record in records]
    return predictions.score_predictions(stage.targets, path, names, label, probs, stage.classes)


def expected_metrics(experiment: Experiment, name: str) -> dict[str, tuple[str, ...]]:
    """Names of the metrics that a stage will write to results.json, by split, known before it runs.

    The `train` split holds step metrics and costs; () means any name.
    """
    spec = experiment.stages[name]
    data = experiment.data_of(spec)
    source = sources.open_split(data)
    stage = run.build_stage(experiment, name, source.classes)
    names: dict[str, tuple[str, ...]] = {"train": ()}
    if spec.val_split:
        names[spec.val_split] = names["val"] = eval.metric_names(stage)
    if "classify" in spec.objectives:
        for split in experiment.eval.splits:
            classification_names = predictions.METRIC_NAMES[stage.targets.loss]
            names[split] = (*names.get(split, ()), *classification_names)
    return names


def _metric_values(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("stage", "split", "step")}
