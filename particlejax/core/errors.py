# SPDX-License-Identifier: Apache-2.0
"""The exception for user mistakes, in its own module so that settings and `--help` need no JAX."""


class UserError(ValueError):
    """A user mistake: one sentence that names the file or key at fault and the fix.

    `main` prints only the sentence; other exceptions are bugs and keep their traceback.
    """
