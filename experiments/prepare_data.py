# SPDX-License-Identifier: Apache-2.0
"""Converts a folder of videos (or any source) into a sharded TFDS data set that training reads by
random access.

    python -m particlejax.main --config experiments/prepare_data.py \
        --config.data.source=folder:PATH \
        --config.prepare.data_dir=DIR --config.prepare.name=mine

Files are copied as they are, with all that clips.csv says of them; afterwards
--config.data.source=tfds:DIR/mine. Killed or out of space, the same command continues. As fast as
the disk: 660 clips of 40 kB in three seconds on 2 cores. Each line of clips.csv becomes a record
with a copy of its file, so ten lines of one film hold it ten times: cut long films into clips
before. A split of which nothing can be read is left out.
--config.prepare.beam=True runs the same conversion as an Apache Beam pipeline (pip install
particlejax[beam]).
"""

from ml_collections import ConfigDict

from particlejax.config.experiment import DataSpec, Experiment, PrepareSpec, arguments, section


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg: '' or 'tiny' (the tiny toybox)."""
    tiny = arguments(arg, "tiny")["tiny"]
    return ConfigDict(
        section(
            Experiment,
            job="prepare_data",
            data=section(DataSpec, source="toybox:tiny" if tiny else ""),
            prepare=section(PrepareSpec, num_workers=1 if tiny else 2),
        )
    )
