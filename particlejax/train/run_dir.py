# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: it holds one experiment, written down when it is entered first."""

import json
from pathlib import Path
from typing import Any

from particlejax.config import jobs
from particlejax.config.experiment import as_dict
from particlejax.config.jobs import Job
from particlejax.core import io
from particlejax.core.typing import UserError
from particlejax.distributed import cluster
from particlejax.train.log import say
from particlejax.train.stage import CONFIG

# What may change when a run goes on: it says how the work is done, and nothing of what comes out.
_FREE = frozenset(
    {
        "num_workers",
        "num_threads",
        "max_unreadable",
        "decode_timeout_seconds",
        "cache_dir",
        "log",
        "storage",
        "distributed",
        "on_nan",
        "profile_steps",
    }
)


def enter(workdir: Path, experiment: Job) -> Path:
    """Makes the folder and writes config.json, or checks that it holds this very experiment. Raises
    UserError.

    Of several processes the first one makes it, and the others check it.
    """
    if not cluster.first():
        cluster.barrier(f"enter {workdir}")
        if not (workdir / CONFIG).exists():
            raise UserError(
                f"workdir {workdir} is not seen by all processes: give a --workdir on a file "
                "system that they share."
            )
    try:
        return _enter(workdir, experiment)
    finally:
        if cluster.first():
            cluster.barrier(f"enter {workdir}")


def _enter(workdir: Path, experiment: Job) -> Path:
    path = workdir / CONFIG
    new = json.loads(json.dumps(as_dict(experiment)))
    if path.exists():
        changed = _differences(jobs.read(path), new)
        if changed:
            raise UserError(
                f"{workdir} holds a run with other settings ({'; '.join(changed[:3])}): give "
                "another --workdir, "
                "or the same settings to continue it."
            )
        return workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        io.write_json(path, jobs.written(experiment))
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written ({error.strerror}): give another --workdir."
        ) from error
    say(f"workdir: {workdir}")
    return workdir


def _differences(old: Any, new: Any, where: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted((old.keys() | new.keys()) - _FREE)
        return [
            text
            for key in keys
            for text in _differences(old.get(key), new.get(key), f"{where}.{key}")
        ]
    if where.endswith(".ram_cache_gib") and (old > 0) == (new > 0):
        return []  # whether clips are kept decides how they are scaled; how many are, nothing
    return [] if old == new else [f"{where} was {old!r}, is {new!r}"]
