# SPDX-License-Identifier: Apache-2.0
"""Suggestions for unknown names: the closest known names."""

import difflib
from collections.abc import Iterable

_MAX_LISTED = 12  # maximum number of listed names


def did_you_mean(name: str, known: Iterable[str], prefix: str = "", max_matches: int = 1) -> str:
    """'did you mean X?' with the closest names, each after `prefix`; else some known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, max_matches, 0.5)
    if close:
        return f"did you mean {' or '.join(prefix + match for match in close)}?"
    listed = ", ".join(known[:_MAX_LISTED]) + ", ..." * (len(known) > _MAX_LISTED)
    return f"choose one of {listed}." if known else "there is none."
