# SPDX-License-Identifier: Apache-2.0
"""Summarizes a data source; finds clips that are the same or look alike, over splits and within
one, and files that are unreadable or do not fit.

    python -m particlejax.main --config experiments/check_data.py --config.data.source=folder:PATH

report.md names the worst pairs and what to do about them; pairs.csv lists all of them. Kinds, the
surest first: the same file (SHA-256), the same decoded frames in another container, overlapping
segments of a film, clips that look alike (another size or compression; not mirrored), and groups
and films in two splits. Labels that contradict are marked. Black clips are compared by equality
alone. problems.csv lists files whose frames and seconds do not fit, whose picture size or sound
format changes, and unreadable ones. The report also has the classes that a split lacks, or has too
few clips of to measure. results.json holds the counts and `unreadable`, a list of {path, reason}.

Set config.data.num_frames and clip_seconds as in the training: the check counts the clips that are
shorter. The job decodes every frame once, and consecutive clips of one file together; 100,000 clips
are compared in half a minute. The time limit of a file is config.data.decode_timeout_seconds for
each minute of video. With config.data.num_workers=2, processes decode, and a file that crashes its
decoder is named. The folder may be checked again, also with other data: the report is replaced.
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
