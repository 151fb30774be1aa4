# SPDX-License-Identifier: Apache-2.0
"""The exception that is meant for people; a file of its own, as settings and `--help` do without
JAX.
"""


class UserError(ValueError):
    """A mistake that its maker can mend: one sentence that names the file or key at fault and the
    remedy.

    `main` prints the sentence alone; any other exception is a bug and keeps its traceback.
    """
