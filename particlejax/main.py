# SPDX-License-Identifier: Apache-2.0
"""`python -m particlejax.main --config NAME[:tiny] [--config.some.key=value] [--workdir DIR]`.

NAME is an experiment file or its name, such as `quickstart` or `pretrain/mae`. `--help` lists the
experiments, `--config NAME --help` the keys of one, `--help=optim` a section. Nothing here imports
JAX before a job runs.
"""

import hashlib
import importlib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from particlejax.config import help as config_help
from particlejax.config import jobs, plugins
from particlejax.config.experiment import Experiment
from particlejax.config.job_specs import EvaluateJob, SweepJob
from particlejax.config.objectives import OBJECTIVES
from particlejax.core.errors import UserError
from particlejax.core.suggest import did_you_mean
from particlejax.jobs import config_files

_USAGE = """\
python -m particlejax.main --config NAME[:ARGUMENT,...] [--config.KEY=VALUE ...] [--workdir DIR]

  --config NAME --help   every key of an experiment: its value, allowed values, meaning
  --help=SECTION         one section, such as optim, augment or an objective
  --config NAME:tiny     a smoke run of seconds, for every experiment
"""


class CommandLine(NamedTuple):
    """The parsed command line.

    file: the experiment with its argument. settings: 'some.key=value' in order. workdir: '' for the
    default. help: None without --help, '' for all of it, else a section.
    """

    file: str = ""
    settings: tuple[str, ...] = ()
    workdir: str = ""
    help: str | None = None


def main(argv: Sequence[str]) -> int:
    """Runs the command line; argv[0] is the program. Returns the exit code.

    0: success, also after --help and a handled SIGTERM; 2: a user's mistake; 75: a process of
    several lost a peer.
    """
    try:
        line = parse(argv[1:])
        if line.help is not None or len(argv) == 1:
            _print(_help_text(line))
            return 0
        config, changed = config_files.configure(line.file, line.settings)
        job = jobs.parse_job(config.to_dict())
    except UserError as error:
        if isinstance(error, config_files.UnknownExperiment):
            print(config_files.listing(_width()), file=sys.stderr)
        return _report(error)
    return _run(job, line, changed)


def _run(job: Any, line: CommandLine, changed: Sequence[str]) -> int:
    """Runs the job in its folder; returns the exit code. changed: keys that the user set."""
    from absl import logging

    from particlejax.distributed import checkpoint, cluster, cpu_malloc
    from particlejax.train import loop, run_dir, stage
    from particlejax.train.log import log_info

    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS log internals as warnings
    try:
        if isinstance(job, Experiment | EvaluateJob):
            cluster.initialize(job.distributed)
        if isinstance(job, Experiment):
            job = stage.inherit_settings(job, set(changed))
        cpu_malloc.keep_heap()
        _cache_programs()
        with _lock(_workdir(line), job):
            folder = run_dir.enter(_workdir(line), job)
            _function(job.job)(job, folder, folder.name)
    except UserError as error:
        return _report(error)
    except loop.Stopped as stop:
        log_info(str(stop))
        return 130 if str(stop).startswith("SIGINT") else 0
    except Exception as error:
        if reason := checkpoint.disk_error(error):
            print(
                f"particlejax: cannot write to --workdir ({reason}): free disk space and run the "
                "same command again; it resumes from the last checkpoint.",
                file=sys.stderr,
            )
            return 2
        if not cluster.is_multiprocess():
            raise
        return cluster.report_failure(error)
    return 0


def _lock(workdir: Path, job: Any) -> AbstractContextManager[None]:
    """The lock of the run folder; processes that share a sweep lock each run of it instead."""
    from particlejax.train import run_lock

    is_shared = isinstance(job, SweepJob) and job.sweep.storage
    return nullcontext() if is_shared else run_lock.hold(workdir)


def _report(error: UserError) -> int:
    """Prints a user's mistake, after the traceback of an experiment file's own exception."""
    if isinstance(error, config_files.ExperimentFailed):
        print(error.trace, end="", file=sys.stderr)
    print(f"particlejax: {error}", file=sys.stderr)
    return 2


def _function(job: str) -> Callable[[Any, Path, str], None]:
    """The function of a job; imports its module."""
    module, _, name = jobs.JOBS[job].function.partition(":")
    return getattr(importlib.import_module(f"particlejax.{module}"), name)


def _cache_programs() -> None:
    """Enables JAX's compilation cache: resumed runs and other seeds do not compile again."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update(
            "jax_compilation_cache_dir", os.path.expanduser("~/.cache/particlejax/programs")
        )


def parse(args: Sequence[str]) -> CommandLine:
    """Parses the command line without the program's name. Flags have one dash or two; the value
    follows `=` or is the next word; a boolean flag may stand alone.

    Raises UserError for an unknown flag and for a missing value. Keys and values are checked later,
    against the experiment.
    """
    file, settings, workdir, help_section = "", [], "", None
    words = list(args)
    while words:
        word = words.pop(0)
        match = re.fullmatch(
            r"--?((?:no)?config\.[^=]+|[A-Za-z][\w.\[\]]*)(?:=(.*))?", word, re.DOTALL
        )
        if not match:
            raise UserError(f"{word!r} is not a flag: write settings as --config.key=value.")
        flag, value = match.groups()
        if flag in ("help", "h"):
            if value is None and words and not words[0].startswith("-"):
                value = words.pop(0)
            help_section = value or ""
        elif flag.startswith("noconfig.") and value is None:
            settings.append(f"{flag.removeprefix('noconfig.')}=false")
        elif flag.startswith("config."):
            if value is None and _is_value(words):
                value = words.pop(0)
            key = flag.removeprefix("config.")
            settings.append(key if value is None else f"{key}={value}")
        elif flag in ("config", "workdir"):
            if value is None and not _is_value(words):
                raise UserError(f"{word} has no value: write {word}=VALUE.")
            value = words.pop(0) if value is None else value
            file, workdir = (value, workdir) if flag == "config" else (file, value)
        else:
            known = ("config", "workdir", "help")
            word = word.partition("=")[0]
            raise UserError(f"there is no flag {word!r}: {did_you_mean(flag, known, '--')}")
    return CommandLine(file, tuple(settings), workdir, help_section)


def _is_value(words: Sequence[str]) -> bool:
    """Whether the next word is the value of the previous flag, not a flag itself."""
    return bool(words) and not re.match(r"--?[A-Za-z]", words[0])


# -- help


def _print(text: str) -> None:
    """Writes to standard output; the reader (`| head`) may close it early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # else flushing the buffer at exit fails again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 140)


def _help_text(line: CommandLine) -> str:
    """The text of --help: all experiments, the keys of one, or a section of them."""
    width = _width()
    if not line.file and line.help:
        # without an experiment: all keys, with a stage called NAME
        sections = config_help.sections(Experiment, {"stages": {"NAME": {}}})
        return config_help.render(config_help.find(sections, line.help), width)
    if not line.file:
        return f"{_USAGE}\n{config_files.listing(width)}"
    config, _ = config_files.configure(line.file, line.settings)
    plugins.load(*config.get("plugins", ()))
    sections = config_help.sections(config_files.spec_of(config), config.to_dict())
    if line.help:
        return config_help.render(config_help.find(sections, line.help), width)
    summary, arguments = config_files.describe(line.file)
    paragraphs = [
        f"{line.file}: {summary}",
        arguments,
        "Set a key with --config.KEY=VALUE, such as --config.seed=1. Values are this "
        "experiment's; a changed default follows as (default VALUE).",
    ]
    if any(".objectives." in section.path for section in sections):
        paragraphs.append(
            f"Objectives: {', '.join(OBJECTIVES)}. Add one by setting any of its keys, such as "
            "--config.stages.STAGE.objectives.NAME.weight=1; --help=NAME shows its keys."
        )
    head = "\n\n".join(textwrap.fill(text, width) for text in paragraphs if text)
    listed = [section for section in sections if section.listed]
    return f"{head}\n\n{config_help.render(listed, width)}"


def _workdir(line: CommandLine) -> Path:
    """The given folder, else runs/NAME with a hash of the overrides, so that other settings use
    another folder.
    """
    if "://" in line.workdir:
        raise UserError(
            f"--workdir {line.workdir} is not a folder of this machine: mount the remote folder, "
            "such as with gcsfuse, and give its path."
        )
    if line.workdir:
        return Path(os.path.expanduser(line.workdir))
    path, _, arg = line.file.partition(":")
    # the same in all processes
    overrides = sorted(f"--config.{s}" for s in line.settings if not s.startswith("distributed."))
    digest = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:8] if overrides else ""
    return Path("runs") / "-".join(
        part for part in (Path(path).stem, re.sub(r"\W+", "_", arg), digest) if part
    )


def _exit(code: int) -> None:
    """Ends the process, through `cluster.exit_process` if a job may have joined other processes."""
    if cluster := sys.modules.get("particlejax.distributed.cluster"):
        cluster.exit_process(code)
    sys.exit(code)


if __name__ == "__main__":
    _exit(main(sys.argv))
