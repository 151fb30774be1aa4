# SPDX-License-Identifier: Apache-2.0
"""Visual words are the nearest of centres that k-means found, the same ones whenever the run was stopped."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax import main as entry
from particlejax import tree
from particlejax.data import sources
from particlejax.modelspec import VisualWordsSpec
from particlejax.nn import heads
from particlejax.sharding import make_mesh
from particlejax.spec import Experiment, MeshSpec
from particlejax.train import codebook, run
from particlejax.typing import UserError


def test_a_code_is_the_nearest_centre_and_k_means_finds_what_is_there() -> None:
    rng = np.random.default_rng(0)
    true = 3 * rng.normal(size=(4, 6)).astype(np.float32)
    points = (true[rng.integers(0, 4, 400)] + 0.1 * rng.normal(size=(400, 6))).astype(np.float32)
    found = codebook.centres(points, VisualWordsSpec(codes=4), 0)
    apart = np.linalg.norm(true[:, None] - found[None], axis=-1)
    assert sorted(apart.argmin(axis=1)) == [0, 1, 2, 3] and apart.min(axis=1).max() < 0.1
    codes = heads.Codebook(4, 6).apply({"params": {"centres": found}}, jnp.asarray(points)[None])[0]
    np.testing.assert_array_equal(codes, np.linalg.norm(points[:, None] - found[None], axis=-1).argmin(axis=1))
    with pytest.raises(UserError, match="4 clusters among 3 different particles"):
        codebook.centres(points[[0, 1, 2, 2]], VisualWordsSpec(codes=4), 0)


def trained(workdir: Path, cache_dir: str) -> dict[str, np.ndarray]:
    """Runs, or continues, the experiment; the average of its parameters."""
    assert entry.main(["main", "--config=experiments/pretrain/one.py:codes,tiny", f"--config.data.cache_dir={cache_dir}",
                       "--config.checkpoint.every=2", "--config.stages.pretrain.val=", "--config.data.modalities=('vision',)",
                       "--config.stages.pretrain.objectives.visual_words.codes=16", "--workdir", str(workdir)]) == 0
    return jax.tree.map(np.asarray, tree.flatten(run.load_trained(str(workdir), make_mesh(MeshSpec()), {})[1]))


def test_a_codebook_is_the_same_after_training_and_after_a_resume(cache_dir: str, tmp_path: Path) -> None:
    whole = trained(tmp_path, cache_dir)
    newest = max((each for each in (tmp_path / "checkpoints/pretrain/latest").iterdir() if each.name.isdigit()),
                 key=lambda each: int(each.name))
    assert newest.name == "4"
    shutil.rmtree(newest)  # as if the run had been killed before its last checkpoint
    (tmp_path / "results.json").unlink()
    again = trained(tmp_path, cache_dir)
    assert set(whole) == set(again)
    for name, leaf in whole.items():
        np.testing.assert_array_equal(leaf, again[name], err_msg=name)
    experiment = Experiment.of(json.loads((tmp_path / "config.json").read_text()))
    stage, _ = run.load_trained(str(tmp_path), make_mesh(MeshSpec()), {})
    source = sources.open_source(experiment.data.source, "train", experiment.data.cache_dir)
    spec, batches = stage.spec.objectives["visual_words"], stage.batches(source, 0)
    found = codebook.centres(codebook.examples(spec, stage, batches), spec, experiment.seed)
    # Averaging equal numbers rounds; weight decay would be a hundred times as much.
    np.testing.assert_allclose(whole["codebook_vision/centres"], found, rtol=1e-6, atol=1e-6)


def test_what_visual_words_cannot_be_made_of() -> None:
    stage = {"steps": 1, "objectives": {"visual_words": {"modality": "text"}}}
    with pytest.raises(UserError, match="name a modality other than text"):
        Experiment.of({"stages": {"one": stage}})
