# SPDX-License-Identifier: Apache-2.0
"""Processes that tests start: each is ended with its test, also where the test fails."""

import subprocess
from typing import Any

# seconds until a test gives up on a process: a machine at load 20 takes minutes to compile a step
DEADLINE = 900

_started: list[subprocess.Popen] = []


def spawn(command: list[str], **settings: Any) -> subprocess.Popen:
    """subprocess.Popen, ended by `end_all` at the latest."""
    process = subprocess.Popen(command, **settings)
    _started.append(process)
    return process


def end_all() -> None:
    """Kills what still runs, and waits for it."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
        process.wait()
