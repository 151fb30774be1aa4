# SPDX-License-Identifier: Apache-2.0
"""Converts a folder of videos, or any source, into a sharded TFDS data set.

    python -m particlejax.main --config experiments/prepare_data.py \
        --config.data.source=folder:PATH \
        --config.prepare.data_dir=DIR --config.prepare.name=mine

Train on it with --config.data.source=tfds:DIR/mine. Files are copied unchanged, with all columns of
clips.csv. After a crash or a full disk, the same command resumes. 660 clips of 40 kB take three
seconds on 2 cores, as fast as the disk. Each row of clips.csv becomes a record with a copy of its
file, so ten rows of one film store it ten times: cut long films into clips first. A split without
readable clips is left out. --config.prepare.beam=True runs the conversion as an Apache Beam
pipeline (pip install -e ".[beam]").
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import arguments, section
from particlejax.config.job_specs import PrepareDataJob, PrepareDataSpec, PrepareSpec


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (the tiny toybox)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            PrepareDataJob,
            data=section(PrepareDataSpec, source="toybox:tiny" if tiny else ""),
            prepare=section(PrepareSpec, num_workers=1 if tiny else 2),
        )
    )
