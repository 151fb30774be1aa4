# SPDX-License-Identifier: Apache-2.0
"""`python -m particlejax.main --config experiments/NAME.py[:tiny] [--config.some.key=value] [--workdir DIR]`."""

import difflib
import hashlib
import json
import os
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from particlejax import checkpoint, jobspec, sharding
from particlejax.apps import check, explain, import_weights, prepare, recognise, report
from particlejax.apps import evaluate as evaluate_app
from particlejax.apps.bench import data as bench_data
from particlejax.spec import Experiment, as_dict, unknown_key
from particlejax.train import loop, run
from particlejax.train.log import MetricLog, say
from particlejax.typing import UserError


class Asked(NamedTuple):
    """What the command line says: the experiment file with its argument, the config, the folder ('' for the default)."""

    file: str
    config: ml_collections.ConfigDict
    overrides: tuple[str, ...]
    workdir: str


def train(experiment: Experiment, workdir: Path, name: str) -> None:
    """Job 'train': every stage, then the report."""
    mesh = sharding.make_mesh(experiment.mesh)
    log = MetricLog(workdir, experiment.log, name, as_dict(experiment))
    try:
        loop.train(loop.Context(experiment, workdir, mesh, log))
    finally:
        log.close()
    for stage, spec in experiment.stages.items():
        if "masked" in spec.objectives:
            explain.draw_masked(workdir, stage, mesh)
    say(f"report: {report.write(workdir)}")


JOBS = {"train": train, "evaluate": evaluate_app.evaluate, "prepare": prepare.prepare, "check_data": check.check_data,
        "bench_data": bench_data.bench, "import_weights": import_weights.import_weights, "recognise": recognise.recognise}


def main(argv: Sequence[str]) -> int:
    """Runs what the flags say. Returns the exit code: 0 also after a SIGTERM that was heeded, 2 for a user's mistake."""
    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS report their inner workings as warnings
    try:
        asked = _parse(argv)
        experiment = jobspec.of(asked.config.to_dict())
        workdir = _enter(_workdir(asked), experiment)
        JOBS[experiment.job](experiment, workdir, workdir.name)
    except UserError as error:
        print(f"particlejax: {error}", file=sys.stderr)
        return 2
    except loop.Stopped as stop:
        say(str(stop))
        return 130 if str(stop).startswith("SIGINT") else 0
    return 0


def _parse(argv: Sequence[str]) -> Asked:
    values = flags.FlagValues()  # not the global ones, so that one process can run several experiments
    config_flags.DEFINE_config_file("config", None, "Experiment file.", lock_config=True, flag_values=values)
    flags.DEFINE_string("workdir", "", "Where the run lives; by default runs/ and the experiment's name.",
                        flag_values=values)
    _load(_file(argv))  # first by ourselves: ml_collections buries what goes wrong in the file
    before, sys.argv = sys.argv, list(argv)  # where ml_collections looks for the settings
    try:
        rest = values(list(argv))[1:]
    except (AttributeError, KeyError) as error:  # ml_collections names the last part of an unknown key, and no more
        raise UserError(_unknown_override(argv)) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    finally:
        sys.argv = before
    if rest:
        raise UserError(f"{rest[0]!r} is not understood: settings are written --config.key=value.")
    overrides = tuple(sorted(a for a in argv if re.match(r"--?(no)?config\.", a)))
    return Asked(_file(argv), values.config, overrides, values.workdir)


def _file(argv: Sequence[str]) -> str:
    """The experiment file as it was written, with its argument."""
    at = next((i for i, a in enumerate(argv) if re.match(r"--?config(=|$)", a)), None)
    if at is None:
        return ""
    return argv[at].split("=", 1)[1] if "=" in argv[at] else "".join(argv[at + 1 : at + 2])


def _load(file: str) -> ml_collections.ConfigDict:
    """The config of an experiment file before any setting is changed."""
    path, _, arg = file.partition(":")
    if not path:
        raise UserError("no experiment: add --config experiments/quickstart.py or another file of experiments/.")
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, [str(p) for p in Path("experiments").rglob("*.py")], 1)
        remedy = f"did you mean {near[0]}?" if near else "check its path."
        raise UserError(f"the experiment file {path!r} is not there: {remedy}")
    make = runpy.run_path(path)["get_config"]
    return make(arg) if arg else make()


def _unknown_override(argv: Sequence[str]) -> str:
    """The sentence for the first --config.KEY that the experiment file does not have."""
    config = _load(_file(argv))
    for text in argv:
        found = re.match(r"--?(?:no)?config\.([\w.]+)", text)
        node, where = config, "config"
        for part in found[1].split(".") if found else ():
            if not isinstance(node, Mapping | ml_collections.ConfigDict) or part not in node:
                return unknown_key(part, where, list(node) if isinstance(node, ml_collections.ConfigDict) else ())
            node, where = node[part], f"{where}.{part}"
    return f"the experiment file and the settings given to it do not fit: {' '.join(argv[1:])}."


def _workdir(asked: Asked) -> Path:
    """The folder that was named; else runs/NAME, with a mark of the overrides so that other settings live elsewhere."""
    if asked.workdir:
        return Path(os.path.expanduser(asked.workdir))
    path, _, arg = asked.file.partition(":")
    mark = hashlib.sha256("\n".join(asked.overrides).encode()).hexdigest()[:8] if asked.overrides else ""
    return Path("runs") / "-".join(part for part in (Path(path).stem, re.sub(r"\W+", "_", arg), mark) if part)


def _enter(workdir: Path, experiment: jobspec.Job) -> Path:
    """Makes the folder and writes config.json, or checks that it holds this very experiment."""
    path = workdir / run.CONFIG
    new = json.loads(json.dumps(as_dict(experiment)))
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = _differences(old, new)
        if changed:
            raise UserError(f"{workdir} holds a run with other settings ({'; '.join(changed[:3])}): give another --workdir, "
                            "or the same settings to continue it.")
        return workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path, new)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written ({error.strerror}): give another --workdir.") from error
    say(f"workdir: {workdir}")
    return workdir


def _differences(old: Any, new: Any, where: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [text for key in keys for text in _differences(old.get(key), new.get(key), f"{where}.{key}")]
    return [] if old == new else [f"{where} was {old!r}, is {new!r}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
