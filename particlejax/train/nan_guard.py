# SPDX-License-Identifier: Apache-2.0
"""What happens at a loss or a gradient that is no number: the run stops, or leaves the step out;
the clips are named.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from particlejax.core import io
from particlejax.core.typing import UserError
from particlejax.distributed import cluster
from particlejax.train.log import say

_IN_A_ROW = 20  # steps left out after which the training is not going anywhere


@dataclass
class Finite:
    """Looks at every step one step late, so that the device never waits.

    clips: of a step (from 1), the names of its clips on all processes. nan/STAGE_STEP.json holds
    them.
    """

    workdir: Path
    stage: str
    on_nan: str
    clips: Callable[[int], list[str]]
    waiting: tuple[int, Any] | None = None
    in_a_row: int = field(init=False, default=0)

    def note(self, step: int, finite: Any) -> None:
        """Remembers a step that has been started: its 'finite' on the device."""
        self.waiting = (step, finite)

    def check(self) -> None:
        """Waits for the step that was noted. Raises UserError where it was no number and that is to
        stop the run.
        """
        if self.waiting is None:
            return
        (step, finite), self.waiting = self.waiting, None
        if bool(finite):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        path = self._write(step)
        what = (
            f"{self.stage}: the loss, its gradient or a parameter is no number after step {step} "
            f"(its clips are named in {path})"
        )
        if self.on_nan == "skip" and self.in_a_row < _IN_A_ROW:
            say(f"{what}: the step is left out.")
            return
        again = (
            f"look at these clips, lower config.stages.{self.stage}.optim.rate or set "
            "optim.grad_clip_norm in a new --workdir"
        )
        if self.on_nan == "skip":
            raise UserError(f"{what}, as in {self.in_a_row} steps in a row: {again}.")
        raise UserError(
            f"{what}: {again}, or continue here with --config.on_nan=skip, which leaves such steps "
            "out; as it is, the "
            "same command replays it from the last checkpoint."
        )

    def _write(self, step: int) -> Path:
        path = self.workdir / "nan" / f"{self.stage}_{step}.json"
        if cluster.first():
            path.parent.mkdir(exist_ok=True)
            io.write_json(
                path,
                {"stage": self.stage, "step": step, "batch": step - 1, "clips": self.clips(step)},
            )
        return path
