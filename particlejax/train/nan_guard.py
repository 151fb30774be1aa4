# SPDX-License-Identifier: Apache-2.0
"""NaN guard: on a NaN or Inf the run stops or skips the step, and lists the batch's clips."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from particlejax.core import io
from particlejax.core.typing import UserError
from particlejax.distributed import cluster
from particlejax.train.log import log_info

_MAX_CONSECUTIVE = 20  # consecutive skipped steps after which the run stops


@dataclass
class NanGuard:
    """Checks every step one step late, so that the device never waits.

    clip_names: step (from 1) -> names of its clips in all processes, written to
    nan/STAGE_STEP.json.
    """

    workdir: Path
    stage: str
    on_nan: str
    clip_names: Callable[[int], list[str]]
    pending: tuple[int, Any] | None = None
    num_consecutive: int = field(init=False, default=0)

    def record(self, step: int, finite: Any) -> None:
        """Stores the 'finite' flag (on the device) of a step that was started."""
        self.pending = (step, finite)

    def check(self) -> None:
        """Waits for the stored step. Raises UserError if it is not finite and the run must stop."""
        if self.pending is None:
            return
        (step, finite), self.pending = self.pending, None
        if bool(finite):
            self.num_consecutive = 0
            return
        self.num_consecutive += 1
        path = self._write(step)
        problem = (
            f"{self.stage}: NaN or Inf in the loss at step {step}, or in its gradient or "
            f"parameters; the batch's clips are listed in {path}"
        )
        if self.on_nan == "skip" and self.num_consecutive < _MAX_CONSECUTIVE:
            log_info(f"{problem}. The step is skipped.")
            return
        remedy = (
            f"check these clips, lower config.stages.{self.stage}.optim.learning_rate or set "
            "optim.grad_clip_norm in a new --workdir"
        )
        if self.on_nan == "skip":
            raise UserError(
                f"{problem}. This happened in {self.num_consecutive} consecutive steps: {remedy}."
            )
        raise UserError(
            f"{problem}. To fix it, {remedy}, or set --config.on_nan=skip to skip such steps; "
            "otherwise the same command replays the step from the last checkpoint."
        )

    def _write(self, step: int) -> Path:
        path = self.workdir / "nan" / f"{self.stage}_{step}.json"
        if cluster.is_primary():
            path.parent.mkdir(exist_ok=True)
            io.write_json(
                path,
                {
                    "stage": self.stage,
                    "step": step,
                    "batch": step - 1,
                    "clips": self.clip_names(step),
                },
            )
        return path
