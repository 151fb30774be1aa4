# SPDX-License-Identifier: Apache-2.0
"""The exception for user mistakes; free of JAX, so that settings and `--help` load without it."""


class UserError(ValueError):
    """A user's mistake: one sentence that names the file or key and what to do.

    `main` prints only the sentence; other exceptions are bugs and keep their traceback.
    """


def install_line(extra: str) -> str:
    """The command that installs an extra; run it in a clone, as no index has the package."""
    return f'pip install -e ".[{extra}]"'
