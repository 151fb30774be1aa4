# SPDX-License-Identifier: Apache-2.0
"""Summarizes a data source; lists unreadable files and near-duplicates.

    python -m particlejax.main --config experiments/check_data.py --config.data.source=folder:PATH

results.json holds the figures and `unreadable`, a list of {path, reason}; report.md shows them. The
job decodes every frame once; consecutive clips of one file are decoded together. The time limit of
a file is config.data.decode_timeout_seconds for each minute of video.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import DataSpec, arguments, section
from particlejax.config.job_specs import CheckDataJob


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (the tiny toybox)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(CheckDataJob, data=section(DataSpec, source="toybox:tiny" if tiny else ""))
    )
