# SPDX-License-Identifier: Apache-2.0
"""`python -m particlejax.main --config experiments/NAME.py[:tiny] [--config.some.key=value]
[--workdir DIR]`.
"""

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from particlejax.benchmarks import dataloader as bench_dataloader
from particlejax.benchmarks import fault_tolerance as bench_fault_tolerance
from particlejax.benchmarks import particles as bench_particles
from particlejax.benchmarks import scaling as bench_scaling
from particlejax.benchmarks import videomae as bench_videomae
from particlejax.config import jobs
from particlejax.config.experiment import Experiment
from particlejax.core.typing import UserError
from particlejax.distributed import checkpoint, cluster, cpu_malloc
from particlejax.jobs import (
    check_data,
    config_files,
    evaluate,
    extract_features,
    fewshot,
    import_weights,
    linear_probe,
    model_soup,
    plan,
    predict,
    prepare_data,
    probe,
    sweep,
    train,
)
from particlejax.train import loop, run_dir, stage
from particlejax.train.log import say


class Asked(NamedTuple):
    """What the command line says: the experiment file with its argument, the config, the folder (''
    for the default).
    """

    file: str
    config: ml_collections.ConfigDict
    overrides: tuple[str, ...]
    workdir: str


JOBS = {
    "train": train.train,
    "sweep": sweep.sweep,
    "evaluate": evaluate.evaluate,
    "prepare_data": prepare_data.prepare_data,
    "check_data": check_data.check_data,
    "bench_dataloader": bench_dataloader.bench,
    "bench_particles": bench_particles.bench,
    "bench_fault_tolerance": bench_fault_tolerance.bench,
    "bench_videomae": bench_videomae.bench,
    "import_weights": import_weights.import_weights,
    "predict": predict.predict,
    "probe": probe.probe,
    "linear_probe": linear_probe.linear_probe,
    "extract_features": extract_features.extract_features,
    "model_soup": model_soup.model_soup,
    "fewshot_prototypes": fewshot.fewshot_prototypes,
    "active_learning": fewshot.active_learning,
    "plan": plan.plan,
    "bench_scaling": bench_scaling.bench,
}


def main(argv: Sequence[str]) -> int:
    """Runs what the flags say. Returns the exit code.

    0, also after a SIGTERM that was heeded; 2 for a user's mistake; of several processes 75 where
    another one was lost.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS report their inner workings as warnings
    try:
        asked = _parse(argv)
        job = jobs.of(asked.config.to_dict())
        if isinstance(job, Experiment):
            cluster.start(job.distributed)
            job = stage.adopt(
                job, {re.match(r"--?(?:no)?config\.([\w.]+)", text)[1] for text in asked.overrides}
            )
        cpu_malloc.keep()
        _cache_programs()
        folder = run_dir.enter(_workdir(asked), job)
        JOBS[job.job](job, folder, folder.name)
    except UserError as error:
        print(f"particlejax: {error}", file=sys.stderr)
        return 2
    except loop.Stopped as stop:
        say(str(stop))
        return 130 if str(stop).startswith("SIGINT") else 0
    except Exception as error:
        if reason := checkpoint.disk_fault(error):
            print(
                f"particlejax: a file of the run cannot be written ({reason}): make room on the "
                "disk of --workdir and give the "
                "same command again, it continues from the last checkpoint.",
                file=sys.stderr,
            )
            return 2
        if not cluster.several():
            raise
        return cluster.failed(error)
    return 0


def _cache_programs() -> None:
    """What was compiled once is not compiled again by a run that goes on, or by one of another
    seed.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update(
            "jax_compilation_cache_dir", os.path.expanduser("~/.cache/particlejax/programs")
        )


def _parse(argv: Sequence[str]) -> Asked:
    # not the global ones, so that one process can run several experiments
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Experiment file.", lock_config=True, flag_values=values
    )
    flags.DEFINE_string(
        "workdir",
        "",
        "Where the run lives; by default runs/ and the experiment's name.",
        flag_values=values,
    )
    # first by ourselves: ml_collections buries what goes wrong in the file
    config_files.load(_file(argv))
    before, sys.argv = sys.argv, list(argv)  # where ml_collections looks for the settings
    try:
        rest = values(list(argv))[1:]
    except (
        AttributeError,
        KeyError,
    ) as error:  # ml_collections names the last part of an unknown key, and no more
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


def _unknown_override(argv: Sequence[str]) -> str:
    """The sentence for the first --config.KEY that the experiment file does not have."""
    config = config_files.load(_file(argv))
    for text in argv:
        found = re.match(r"--?(?:no)?config\.([\w.]+)", text)
        if found:
            try:
                config_files.place(config, found[1])
            except UserError as error:
                return str(error)
    return f"the experiment file and the settings given to it do not fit: {' '.join(argv[1:])}."


def _workdir(asked: Asked) -> Path:
    """The folder that was named; else runs/NAME, with a mark of the overrides so that other
    settings live elsewhere.
    """
    if asked.workdir:
        return Path(os.path.expanduser(asked.workdir))
    path, _, arg = asked.file.partition(":")
    # in all processes
    alike = [text for text in asked.overrides if not re.match(r"--?config\.cluster\.", text)]
    mark = hashlib.sha256("\n".join(alike).encode()).hexdigest()[:8] if alike else ""
    return Path("runs") / "-".join(
        part for part in (Path(path).stem, re.sub(r"\W+", "_", arg), mark) if part
    )


if __name__ == "__main__":
    cluster.leave(main(sys.argv))
