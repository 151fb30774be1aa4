# SPDX-License-Identifier: Apache-2.0
"""Logging: metrics.jsonl (bit-reproducible), timing.jsonl, TensorBoard, W&B, the terminal."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from particlejax.config import renames
from particlejax.config.training import LogSpec
from particlejax.core import io
from particlejax.core.errors import UserError, install_line
from particlejax.distributed import cluster

_PRINT_INTERVAL_SECONDS = 15.0  # seconds between lines if the output is no terminal


class MetricLog:
    """Writes the metrics of one run; `truncate` removes lines that a resumed run will write again.

    metrics.jsonl holds only what the seed determines, so two runs compare byte by byte; throughput
    and wait times are in timing.jsonl. Only the first process writes; all processes keep the
    metrics, which are identical.
    """

    def __init__(self, workdir: Path, spec: LogSpec, name: str, config: Mapping[str, Any]) -> None:
        self._metrics, self._timing = workdir / "metrics.jsonl", workdir / "timing.jsonl"
        self._records: list[dict[str, Any]] = list(_read_lines(self._metrics))
        self._is_primary = cluster.is_primary()
        self._wandb = (
            _wandb_run(spec, name, config, workdir)
            if spec.wandb_project and self._is_primary
            else None
        )
        self._board = _TensorBoard(workdir / "tensorboard") if self._is_primary else None

    def write(self, stage: str, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes one line of metrics; NaN and infinities become strings, which JSON can hold."""
        self._records.append({"stage": stage, "step": step, "split": split, **json_ready(values)})
        self._append(self._metrics, self._records[-1])
        self._show(f"{stage}/{split}", step, values)

    def write_timing(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes one line of timings."""
        self._append(self._timing, {"stage": stage, "step": step, **json_ready(values)})
        self._show(f"{stage}/timing", step, values)

    def read_metrics(self, stage: str, split: str) -> list[dict[str, Any]]:
        """The lines of one stage and split so far, in order."""
        return [line for line in self._records if line["stage"] == stage and line["split"] == split]

    def read_timings(self, stage: str) -> list[dict[str, Any]]:
        """The timing lines of one stage so far, in order."""
        return [line for line in _read_lines(self._timing) if line["stage"] == stage]

    def truncate(self, stage: str, step: int, later_stages: tuple[str, ...]) -> None:
        """Removes lines of `stage` after `step`, all lines of `later_stages`, and an incomplete
        last line.
        """

        def is_kept(line: Mapping[str, Any]) -> bool:
            return line["stage"] not in later_stages and (
                line["stage"] != stage or line["step"] <= step
            )

        self._records = [line for line in self._records if is_kept(line)]
        for path in (self._metrics, self._timing) if self._is_primary else ():
            kept = [line for line in _read_lines(path) if is_kept(line)]
            io.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def close(self) -> None:
        """Flushes all writers."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        if not self._is_primary:
            return
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _show(self, prefix: str, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            self._board.write({f"{prefix}/{name}": value for name, value in values.items()}, step)
        if self._wandb is not None:
            self._wandb.log(
                {f"{prefix}/{name}": value for name, value in values.items()} | {"stage_step": step}
            )


class _TensorBoard:
    """Writes TensorBoard's file synchronously: the library's writer thread dies on a full disk and
    its queue then blocks.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))

    def write(self, values: Mapping[str, float], step: int) -> None:
        summary = Summary(
            value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Progress:
    """A progress bar with rate and remaining time on a terminal, plain lines elsewhere."""

    def __init__(self, name: str, total: int, initial: int = 0, unit: str = "step") -> None:
        self._bar = tqdm.tqdm(
            total=total, initial=initial, desc=name, unit=unit, disable=None, dynamic_ncols=True
        )
        self._name, self._total, self._unit = name, total, unit
        self._initial, self._done, self._start_time = initial, initial, time.monotonic()
        self._compiled = False
        self._last_print = self._start_time
        self._note = ""

    def update(self, note: str = "") -> None:
        """Counts one more item; shows `note` after the bar."""
        self._done += 1
        if not self._compiled:  # the first one compiles: it tells nothing of the others
            self._compiled, self._initial, self._start_time = True, self._done, time.monotonic()
            self._bar.initial, self._bar.start_t = self._done, time.time()
        self._note = note or self._note
        self._bar.update()
        if not self._bar.disable:
            self._bar.set_postfix_str(self._note, refresh=False)
        elif cluster.is_primary() and (
            time.monotonic() - self._last_print > _PRINT_INTERVAL_SECONDS
            or self._done == self._total
        ):
            self._last_print = time.monotonic()
            line = f"{self._name}: {self._unit} {self._done}/{self._total}"
            if self._done > self._initial:  # the rate of the first one is unknown
                rate = (self._done - self._initial) / max(self._last_print - self._start_time, 1e-6)
                remaining = _format_duration((self._total - self._done) / max(rate, 1e-6))
                line += f", {rate:.2f}/s, {remaining} left"
            log_info(f"{line}  {self._note}")

    def close(self) -> None:
        """Closes the bar and leaves it visible."""
        self._bar.close()


def log_info(message: str) -> None:
    """Prints a line above any progress bar; only the first process prints."""
    if cluster.is_primary():
        log_info_local(message)


def log_info_local(message: str) -> None:
    """Prints a line from any process, for messages about that process alone."""
    tqdm.tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def _format_duration(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for text in path.read_text(encoding="utf-8").split("\n"):
            # the last line of a killed run may be incomplete
            try:
                yield renames.figures(json.loads(text))
            except ValueError:
                continue


def json_ready(values: Mapping[str, float]) -> dict[str, float | str]:
    """Values that JSON can hold: NaN and infinities are strings."""
    return {name: float(v) if math.isfinite(v) else str(float(v)) for name, v in values.items()}


def _wandb_run(spec: LogSpec, name: str, config: Mapping[str, Any], workdir: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"config.log.wandb_project={spec.wandb_project!r} needs Weights & Biases: run "
            f"`{install_line('wandb')}`, or leave it empty."
        ) from error
    return wandb.init(
        project=spec.wandb_project,
        name=name,
        config=dict(config),
        dir=str(workdir),
        resume="allow",
        id=f"{name}-{hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:8]}",
    )
