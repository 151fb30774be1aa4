# SPDX-License-Identifier: Apache-2.0
"""The one training loop: a stage from its start, or from where it stopped, to its figures in
results.json.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from particlejax.config.experiment import Experiment
from particlejax.core import flops, tree
from particlejax.core.typing import UserError
from particlejax.data import label_subset, pipeline, sources
from particlejax.data.packing_plan import Stand
from particlejax.distributed import cluster, sharding
from particlejax.distributed.checkpoint import Checkpoints
from particlejax.finetune import partition, restore
from particlejax.train import codebook, eval, optim, predictions, pretrained, train_step
from particlejax.train import stage as run
from particlejax.train.log import MetricLog, Progress, say
from particlejax.train.nan_guard import Finite
from particlejax.train.telemetry import Compilations, Gauge, Trace, peak_of
from particlejax.train.train_state import TrainState, abstract, initialise, jit_step, saved


class Stopped(Exception):
    """Somebody asked the run to stop; everything is saved."""


@dataclass
class Context:
    """What all stages of a run share. `asked` names the signal that asked the run to stop, '' while
    none did.
    """

    experiment: Experiment
    workdir: Path
    mesh: Mesh
    log: MetricLog
    asked: str = ""
    looks: int = 0  # how often this was looked at, alike in all processes

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask for a stop; a second Ctrl-C does not wait for it.

        With several processes SIGTERM is JAX's to hear, which carries it to all of them, and Ctrl-C
        is turned into one.
        """

        def ask(number: int, frame: Any) -> None:
            del frame
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = signal.Signals(number).name
            if cluster.several():
                os.kill(os.getpid(), signal.SIGTERM)

        heard = (signal.SIGINT,) if cluster.several() else (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, ask) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def must_stop(self) -> bool:
        """Whether to stop here; with several processes, all of them are told so at the same
        look.
        """
        self.looks += 1
        if cluster.several() and multihost_utils.reached_preemption_sync_point(self.looks):
            self.asked = self.asked or "SIGTERM"
            return True
        return bool(self.asked) and not cluster.several()


def train(context: Context) -> None:
    """All stages that results.json does not hold yet, in their order. Raises Stopped after
    saving.
    """
    for name in context.experiment.stages:
        if "train" in run.read_results(context.workdir).get(name, {}):
            say(f"{name}: done before, see {context.workdir / run.RESULTS}")
            continue
        _Trainer(context, name).run()


@dataclass
class _Trainer:
    """One stage under way. What it must remember beyond the state is derived from metrics.jsonl."""

    context: Context
    name: str
    bad: run.BadClips = field(init=False)
    gauge: Gauge = field(init=False)
    running: Any = None  # a result of the step that was started last
    pending: tuple[int, Any] | None = (
        None  # step and metrics not read yet: one step late, the device never waits
    )

    def run(self) -> None:
        """Trains, measures, writes the figures."""
        self._prepare()
        begun = time.monotonic()
        with self.context.signals(), closing(self.best), closing(self.latest):
            self._steps()
            self._finish(time.monotonic() - begun)

    # -- before the first step

    def _prepare(self) -> None:
        experiment, mesh = self.context.experiment, self.context.mesh
        spec = experiment.stages[self.name]
        data = experiment.data_of(spec)
        sharding.check_rows(
            spec.rows // spec.accumulate, mesh, f"config.stages.{self.name}.rows / accumulate"
        )
        self.source = label_subset.limit(
            sources.open_source(data.source, data.split, data.cache_dir), data, experiment.seed
        )
        self.stage = run.build(experiment, self.name, self.source.classes, mesh)
        self.val = self._open(spec.val) if spec.val else None
        self._check_measuring()
        clips = len(pipeline.chosen_clips(len(self.source), data.fraction))
        self.batches = self.stage.batches(self.source, math.ceil(clips * spec.epochs))
        self.steps = spec.steps or self.batches.plan.batches()
        self.bad = run.BadClips(data.max_bad)
        self.targets = run.weighted(self.stage, self.source)
        made = train_step.of(self.stage, self.targets, self.steps)
        state = initialise(
            self.stage.model,
            made.optimizer,
            self.stage.example,
            experiment.seed,
            spec.ema,
            mesh,
            spec.tune,
        )
        self.whole = jax.jit(lambda params, frozen: partition.whole(spec.tune, params, frozen))
        self.step = jit_step(made.step, state, mesh)
        self.finite = Finite(self.context.workdir, self.name, experiment.on_nan, self._clips)
        self.gauge = Gauge(
            self._operations,
            peak_of(experiment.log.peak, experiment.model_of(spec).dtype),
            self.stage.reader[1],
        )
        self.measure = eval.jit_measure(made.objective, self.stage.model, mesh)
        self._restore(state)
        each = self.batches.plan.seen(self.steps) / self.steps
        trained, every = (
            partition.training(spec.tune, self.state.params),
            tree.count((self.state.params, self.state.frozen)),
        )
        some = (
            f" ({trained / 1e6:.3g} M of them trained: {spec.tune.how})" if trained < every else ""
        )
        say(
            f"{self.name}: {every / 1e6:.2f} M parameters{some}, {clips} clips, {self.steps} steps "
            "of "
            f"{each:.4g} clips" + (f", continuing at step {self.done}" if self.done else "")
        )

    def _check_measuring(self) -> None:
        """Raises UserError for splits or a metric that will not be there: before the training."""
        spec = self.stage.spec
        if "classify" in spec.objectives:
            for split in self.context.experiment.evaluate.splits:
                self._open(split)
        known = eval.metric_names(self.stage)
        if spec.select and not spec.val:
            raise UserError(
                f"config.stages.{self.name}.select={spec.select!r} is measured on the val split, "
                "and val is empty: name a split there."
            )
        if spec.select and spec.select not in known:
            raise UserError(
                f"config.stages.{self.name}.select={spec.select!r} is not measured: choose one of "
                f"{', '.join(known)}."
            )

    def _open(self, split: str) -> sources.Source:
        data = self.stage.data
        return sources.open_source(data.source, split, data.cache_dir, self.stage.classes)

    def _restore(self, state: TrainState) -> None:
        keep = self.context.experiment.checkpoint.keep
        folder = run.checkpoint_folder(self.context.workdir, self.name)
        self.latest = Checkpoints(folder, keep)
        self.best = Checkpoints(folder.with_name("best"), 2)
        # what a checkpoint without the frozen parameters says about where they are
        self.base: dict[str, Any] = {}
        found = self.latest.restore(abstract(saved(state)))
        if found:
            self.done, kept, data = found
            self.state = replace(
                kept,
                frozen=self._start(state, data[restore.BASE]).frozen
                if restore.BASE in data
                else (),
            )
            self.bad.reasons.update(data["bad"])
            self.batches = replace(self.batches, since=Stand.of(data["stand"]))
        else:
            self.done, self.state = 0, self._start(codebook.fitted(state, self.stage, self.batches))
        self.best.forget_after(self.done)
        stages = list(self.context.experiment.stages)
        self.context.log.cut(self.name, self.done, tuple(stages[stages.index(self.name) + 1 :]))

    def _start(self, state: TrainState, before: dict[str, Any] | None = None) -> TrainState:
        """The state with the parameters that it starts from, of the very checkpoint that it was
        begun with `before`.
        """
        folder, tuning = (
            run.find_init(self.context.experiment, self.name, self.context.workdir),
            self.stage.spec.tune,
        )
        if folder is None and tuning.how != "full":
            raise UserError(
                f"config.stages.{self.name}.tune.how={tuning.how!r} would freeze random "
                "parameters: name a run to "
                "start from in config.init, or an earlier stage in the stage's init."
            )
        if folder is None:
            return pretrained.begun(state, self.stage)
        if tuning.how != "full":
            here = run.checkpoint_folder(self.context.workdir, self.name)
            self.base = {restore.BASE: before or restore.reference(folder, here, tuning)}
            folder = restore.base_folder(here, self.base[restore.BASE])
        start, sentence = restore.from_checkpoint(
            partition.base(state.params, state.frozen), folder
        )
        say(f"{self.name}: {'stands on' if before else 'starts from'} {sentence}")
        params, frozen = partition.rebased(state.params, state.frozen, start)
        average = jax.tree.map(lambda x: x.copy(), params) if self.stage.spec.ema else ()
        return replace(state, params=params, average=average, frozen=frozen)

    def _whole(self, state: TrainState) -> Any:
        """The parameters to measure, as the model reads them."""
        all_train = self.stage.spec.tune.how == "full"
        return state.best_params if all_train else self.whole(state.best_params, state.frozen)

    # -- the steps

    def _steps(self) -> None:
        if self._due_measure(self.done) and not self._measured(self.done):
            self._measure()  # it was stopped while measuring
        if self._over():
            return
        stream = pipeline.read(self.batches, self.done, self.steps, self.stage.data)
        progress = Progress(self.name, self.steps, self.done)
        self.gauge.begin()
        self.trace = Trace(self.context.workdir, self.context.experiment.profile_steps)
        self.compilations = Compilations(self.name, self.step)
        try:
            while self.done < self.steps and not self._over():
                self._one(stream, progress)
        finally:
            stream.close()
            progress.close()
            self.trace.stop(self.running)

    def _one(self, stream: Iterator[pipeline.Loaded], progress: Progress) -> None:
        with self.gauge.spent(
            "data", unless=lambda: self.running is not None and not self.running.is_ready()
        ):
            loaded = self._next(stream)
        self.bad.note(loaded)
        self.trace.before(self.done + 1)
        self.state, metrics = self.step(self.state, sharding.put(loaded.batch, self.context.mesh))
        self.done += 1
        self.running = metrics["loss"]
        self.compilations.check(self.done)
        self.finite.check()  # of the step before
        self.finite.note(self.done, metrics.pop("finite"))
        note = self._flush()
        self.gauge.add(loaded.batch)
        self.trace.after(self.done, self.running)
        every = self.context.experiment
        if self.done % every.log.every == 0 or self.done == self.steps:
            self.pending = (self.done, metrics)
        progress.update(note)
        if self._due_measure(self.done):
            self.finite.check()
            self._flush()
            self._measure()
        if self.done % every.checkpoint.every == 0 or self.done == self.steps:
            self._save()
        self._heed()

    def _next(self, stream: Iterator[pipeline.Loaded]) -> pipeline.Loaded:
        try:
            return next(stream)
        except UserError:  # a process that decodes was killed: what was trained is not lost with it
            if not cluster.several():  # the others do not know, and saving takes all of them
                self._save()
            raise

    def _heed(self) -> None:
        """Saves and leaves when somebody asked for it."""
        if self.context.must_stop():
            self._save()
            self.latest.finish()
            raise Stopped(
                f"{self.context.asked}: {self.name} is saved at step {self.done} of {self.steps}, "
                "the same "
                "command continues there."
            )

    def _flush(self) -> str:
        """Writes the metrics that are still on the device; a note for the progress bar."""
        if self.pending is None:
            return ""
        (step, metrics), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values["rate"] = float(optim.schedule(self.stage.spec.optim, self.steps)(step - 1))
        self.context.log.write(self.name, step, "train", values)
        self.context.log.time(self.name, step, self.gauge.figures())
        return f"loss {values['loss']:.4f}"

    def _clips(self, step: int) -> list[str]:
        return [self.source[number].name for number in self.batches.clips(step - 1)]

    def _save(self) -> None:
        self.finite.check()  # a state that is no number is never saved
        self._flush()
        with self.gauge.spent("save"):
            # first: who resumes from this step will not measure what came before it again
            self.best.finish()
            self.latest.save(self.done, saved(self.state), self._data())

    def _data(self) -> dict[str, Any]:
        return {
            "stand": self.batches.plan.stand(self.done),
            "seed": self.context.experiment.seed,
            "bad": self.bad.all(),
            "classes": list(self.stage.classes),
            **self.base,
        }

    # -- measuring while training

    def _due_measure(self, step: int) -> bool:
        every = self.stage.spec.val_every
        return (
            self.val is not None
            and step > 0
            and (step == self.steps or (every > 0 and step % every == 0))
        )

    def _measured(self, step: int) -> bool:
        return any(line["step"] == step for line in self.context.log.lines(self.name, "val"))

    def _measure(self) -> None:
        with self.gauge.spent("measure"):
            self._measured_now()

    def _measured_now(self) -> None:
        views = self.stage.views(self.val, self.stage.spec.rows)
        values = eval.metrics_of(
            self.measure, self._whole(self.state), views, self.context.mesh, self._watch
        )
        self.context.log.write(self.name, self.done, "val", values)
        if self._selected() and self._best_step() == self.done:
            self.best.save(self.done, saved(self.state), self._data())

    def _watch(self, loaded: pipeline.Loaded) -> None:
        self.bad.note(loaded)
        self._heed()

    def _selected(self) -> list[tuple[float, int]]:
        """(value, step) of every measurement of the selected metric, larger is better."""
        spec = self.stage.spec
        lines = self.context.log.lines(self.name, "val") if spec.select else []
        sign = 1.0 if spec.select_mode == "max" else -1.0
        return [(sign * float(line[spec.select]), line["step"]) for line in lines]

    def _best_step(self) -> int:
        return max(self._selected(), key=lambda each: (each[0], -each[1]))[1]

    def _over(self) -> bool:
        """Whether patience has run out."""
        values = self._selected()
        patience = self.stage.spec.patience
        if (
            not (patience and values)
            or sum(step > self._best_step() for _, step in values) < patience
        ):
            return False
        say(
            f"{self.name}: no better {self.stage.spec.select} in {patience} measurements, stopping "
            f"at step {self.done}"
        )
        return True

    # -- after the last step

    def _finish(self, seconds: float) -> None:
        self._save()
        self.best.finish()
        self.latest.finish()
        log, stage = self.context.log, self.stage
        last = {split: log.lines(self.name, split)[-1:] for split in ("train", "val")}
        figures: dict[str, Any] = {
            split: _figures(lines[0]) for split, lines in last.items() if lines
        }
        figures["train"] = figures.get("train", {}) | {
            "steps": self.done,
            "seconds_since_start": round(seconds, 1),
            "clips_seen": self.batches.plan.seen(self.done),
            "clips": len(pipeline.chosen_clips(len(self.source), stage.data.fraction)),
            "parameters": tree.count(partition.base(self.state.params, self.state.frozen)),
            "parameters_trained": partition.training(stage.spec.tune, self.state.params),
            "parameters_saved": tree.count(saved(self.state).best_params),
            "compilations": self.step._cache_size(),
            **self._costs(),
        }
        if "classify" in stage.spec.objectives:
            for split in self.context.experiment.evaluate.splits:
                figures[split] = figures.get(split, {}) | self._classify(split)
        run.add_results(self.context.workdir, self.name, figures, self.bad.all())
        # who goes on reads what the first process has written
        cluster.barrier(f"{self.name} is done")

    def _costs(self) -> dict[str, float]:
        """What training took: measured over the whole run, also where it was resumed, and
        operations from shapes.
        """
        lines = self.context.log.timings(self.name)
        if not lines:
            return {}
        each = {
            key: [line[key] for line in lines if key in line]
            for key in ("seconds_per_step", "clips_per_second", "data_wait_share", "fill", "mfu")
        }
        middle = {key: float(np.median(values)) for key, values in each.items() if values}
        return {
            "seconds_of_steps": middle.pop("seconds_per_step") * self.done,
            **middle,
            "particles_per_clip": float(np.mean([line["particles_per_clip"] for line in lines])),
            "flops_per_clip": self._operations()
            * self.done
            / max(self.batches.plan.seen(self.done), 1),
        }

    def _operations(self) -> int:
        """Of a step, from shapes; what the backward pass computes again is not the model's."""
        row = pipeline.example(self.batches.plan.schedule.row, 1)
        # as it is called, so not traced again
        rows, divided = (self.stage.spec.rows, sharding.batch_sharding(self.context.mesh))
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=divided), row
        )
        if self.context.experiment.model_of(self.stage.spec).remat == "none":
            return flops.count(self.step.trace(abstract(self.state), batch).jaxpr)
        experiment = replace(
            self.context.experiment,
            stages={
                self.name: replace(
                    self.stage.spec, model={**self.stage.spec.model, "remat": "none"}
                )
            },
        )
        plain = run.build(experiment, self.name, self.stage.classes)
        return flops.count(
            jax.make_jaxpr(train_step.of(plain, self.targets, self.steps).step)(
                abstract(self.state), batch
            )
        )

    def _classify(self, split: str) -> dict[str, Any]:
        params = self._whole(self.state)
        if self._selected():
            found = self.best.restore(abstract(saved(self.state)))
            params = self._whole(replace(found[1], frozen=self.state.frozen)) if found else params
        return classify(
            self.stage, params, self._open(split), self.context, f"{self.name}_{split}", self._watch
        )


def classify(
    stage: run.Stage,
    params: Any,
    source: sources.Source,
    context: Context,
    name: str,
    watch: eval.Watch,
) -> dict[str, Any]:
    """Scores over all views of a source; each clip's probabilities go to predictions_NAME.csv."""
    spec = context.experiment.evaluate
    sharding.check_rows(spec.rows, context.mesh, "config.evaluate.rows")
    views = stage.views(source, spec.rows, spec.views, spec.scale)
    predict = eval.jit_predict(stage.model, context.mesh, stage.targets.answers)
    numbers, found = eval.probabilities(
        predict, params, views, context.mesh, watch, f"evaluate {name}"
    )
    records = [source[int(n)] for n in numbers]
    label = np.array([record.label for record in records], int)
    path = context.workdir / (f"predictions_{name}.csv" if name else "predictions.csv")
    if not cluster.first():
        path = None
    return predictions.score(
        stage.targets, path, [record.name for record in records], label, found, stage.classes
    )


def figures_of(experiment: Experiment, name: str) -> dict[str, tuple[str, ...]]:
    """Names of the figures that a stage will leave in results.json, by split: known before it runs.

    Those of `train` are metrics of the step and what it cost; () stands for any.
    """
    spec = experiment.stages[name]
    data = experiment.data_of(spec)
    source = sources.open_source(data.source, data.split, data.cache_dir)
    stage = run.build(experiment, name, source.classes)
    found: dict[str, tuple[str, ...]] = {"train": ()}
    if spec.val:
        found[spec.val] = found["val"] = eval.metric_names(stage)
    if "classify" in spec.objectives:
        for split in experiment.evaluate.splits:
            scored = predictions.FIGURES[stage.targets.loss]
            found[split] = (*found.get(split, ()), *scored)
    return found


def _figures(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("stage", "split", "step")}
