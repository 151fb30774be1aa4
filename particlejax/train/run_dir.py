# SPDX-License-Identifier: Apache-2.0
"""The run folder: holds one experiment, whose config.json is written on first use."""

import json
from pathlib import Path
from typing import Any

from particlejax.config import jobs
from particlejax.config.fields import Spec, as_dict
from particlejax.core import io
from particlejax.core.typing import UserError
from particlejax.distributed import cluster
from particlejax.models.zoo.convert.description import DEFAULT_MODEL
from particlejax.train.log import log_info
from particlejax.train.stage import CONFIG, RESULTS, read_results

# What may change when a run goes on: measuring, logging and speed, which no parameter depends on.
_MAY_CHANGE = frozenset(
    {
        "format",
        "num_workers",
        "num_threads",
        "max_unreadable",
        "max_unreadable_fraction",
        "decode_timeout_seconds",
        "cache_dir",
        "log",
        "storage",
        "distributed",
        "checkpoint",
        "eval",
        "on_nan",
        "profile_steps",
        "val_every_steps",
        "bench",
        "prepare",
    }
)
# Jobs that replace what they have written: nothing was trained that other settings could mix with.
_REPEATABLE = frozenset({"check_data"})
# A longer run goes on: these may grow, and the schedule may be named anew with them.
_LONGER = ("num_steps", "num_epochs")
_SCHEDULE = "schedule_steps"


def enter(workdir: Path, experiment: Spec) -> Path:
    """Creates the folder and writes config.json, or checks that it holds this experiment. Raises
    UserError.

    With several processes the first one creates the folder and the others check it.
    """
    if not cluster.is_primary():
        cluster.barrier(f"enter {workdir}")
        if not (workdir / CONFIG).exists():
            raise UserError(
                f"workdir {workdir} is not visible to all processes: give a --workdir on a "
                "shared file system."
            )
    try:
        return _enter(workdir, experiment)
    finally:
        if cluster.is_primary():
            cluster.barrier(f"enter {workdir}")


def _enter(workdir: Path, experiment: Spec) -> Path:
    path = workdir / CONFIG
    new = json.loads(json.dumps(as_dict(experiment)))
    if path.exists() and _has_something(workdir):
        old = jobs.read(path)
        repeats = old.get("job") == new.get("job") and new.get("job") in _REPEATABLE
        changed = [] if repeats else _differences(old, new)
        longer = _longer_stages(old, new)
        if changed:
            raise UserError(_refusal(workdir, changed))
        if old != new and cluster.is_primary():
            io.write_json(path, jobs.written(experiment))
        if longer:
            log_info(f"{workdir}: {', '.join(longer)} is longer now and goes on from its last step")
            _reopen(workdir, longer)
        return workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        io.write_json(path, jobs.written(experiment))
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written ({error.strerror}): give another --workdir."
        ) from error
    log_info(f"workdir: {workdir}")
    return workdir


def _has_something(workdir: Path) -> bool:
    """Whether the folder holds a checkpoint or results, which other settings must not mix with."""
    checkpoints = (workdir / "checkpoints").glob("*/*/*")
    return (workdir / RESULTS).exists() or any(p.name.isdigit() for p in checkpoints)


def _refusal(workdir: Path, changed: list[str]) -> str:
    """The sentence for other settings, with the words that start a new run from this one."""
    start = (
        f"add --config.init_from={workdir} to start a new run from its parameters"
        if (workdir / "checkpoints").is_dir()
        else "the new run starts afresh"
    )
    return (
        f"{workdir} holds a run with other settings ({'; '.join(changed[:3])}): give the same "
        f"settings to continue it, or another --workdir ({start})."
    )


def _longer_stages(old: Any, new: Any) -> list[str]:
    """Stages whose num_steps or num_epochs is larger than before."""
    stages = new.get("stages") or {}
    before = old.get("stages") or {}
    return [
        name
        for name, stage in stages.items()
        if any(stage[key] > before.get(name, stage)[key] for key in _LONGER)
    ]


def _reopen(workdir: Path, names: list[str]) -> None:
    """Takes the figures of these stages and of those after them out of results.json: they come
    anew. The file of before stays as results.before.json.
    """
    results = read_results(workdir)
    if not cluster.is_primary() or not any(name in results for name in names):
        return
    io.write_json(workdir / "results.before.json", results)
    for name in names:
        results.pop(name, None)
    io.write_json(workdir / RESULTS, results)


def _differences(old: Any, new: Any, key_path: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted((old.keys() | new.keys()) - _MAY_CHANGE)
        longer = any(new.get(key, 0) > old.get(key, 0) for key in _LONGER if key in old)
        differences = [
            difference
            for key in keys
            if not (longer and (key in _LONGER or key == "optim"))
            for difference in _differences(old.get(key), new.get(key), f"{key_path}.{key}")
        ]
        if longer:
            optim = [
                {k: v for k, v in side["optim"].items() if k != _SCHEDULE} for side in (old, new)
            ]
            differences += _differences(*optim, f"{key_path}.optim")
        return differences
    if key_path.endswith(".ram_cache_gib") and (old > 0) == (new > 0):
        return []  # results depend on whether clips are cached, not on how many
    if key_path == "config.model" and [old, new] in (["", DEFAULT_MODEL], [DEFAULT_MODEL, ""]):
        return []  # of weights that do not say what they are; the name was the default once
    return [] if old == new else [f"{key_path} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    """A value for a sentence; a section that only one side has is called so."""
    if value is None:
        return "not set"
    return "set" if isinstance(value, dict) else repr(value)
