# SPDX-License-Identifier: Apache-2.0
"""Reads a whole source before anybody trains on it and reports what is in it, what is damaged and
what stands twice.

    python -m particlejax.main --config experiments/check_data.py --config.data.source=folder:PATH

results.json holds the figures and `bad`, a list of {path, reason}; report.md shows them. Decodes
every frame once, clips of one file that follow each other together; a file may take
config.data.decode_timeout_seconds for each of its minutes.
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import DataSpec, Experiment, arguments, section


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (the tiny toybox)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            Experiment,
            job="check_data",
            data=section(DataSpec, source="toybox:tiny" if tiny else ""),
        )
    )
