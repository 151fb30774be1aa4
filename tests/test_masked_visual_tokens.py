# SPDX-License-Identifier: Apache-2.0
"""Visual words are the nearest of centres that k-means finds before the first step, the same ones
each time.
"""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax.config.experiment import Experiment, MeshSpec
from particlejax.config.objectives import MaskedVisualTokensSpec
from particlejax.core import tree
from particlejax.core.typing import UserError
from particlejax.data import sources
from particlejax.distributed.sharding import make_mesh
from particlejax.nn import heads
from particlejax.train import codebook, optim
from particlejax.train import stage as run
from particlejax.train.train_state import initialize

ROOT = Path(__file__).parents[1]


def test_a_code_is_the_nearest_centre_and_k_means_finds_what_is_there() -> None:
    rng = np.random.default_rng(0)
    true = 3 * rng.normal(size=(4, 6)).astype(np.float32)
    points = (true[rng.integers(0, 4, 400)] + 0.1 * rng.normal(size=(400, 6))).astype(np.float32)
    found = codebook.kmeans_centers(points, MaskedVisualTokensSpec(codebook_size=4), 0)
    apart = np.linalg.norm(true[:, None] - found[None], axis=-1)
    assert sorted(apart.argmin(axis=1)) == [0, 1, 2, 3] and apart.min(axis=1).max() < 0.1
    codes = heads.Codebook(4, 6).apply({"params": {"centres": found}}, jnp.asarray(points)[None])[0]
    np.testing.assert_array_equal(
        codes, np.linalg.norm(points[:, None] - found[None], axis=-1).argmin(axis=1)
    )
    with pytest.raises(UserError, match="codebook_size=4 exceeds the 3 distinct particles"):
        codebook.kmeans_centers(points[[0, 1, 2, 2]], MaskedVisualTokensSpec(codebook_size=4), 0)


def test_a_stage_begins_with_centres_of_its_own_particles_and_keeps_them(cache_dir: str) -> None:
    config = runpy.run_path(str(ROOT / "experiments/pretrain/single_objective.py"))["get_config"](
        "visual_tokens,tiny"
    ).to_dict()
    config["data"] |= {"cache_dir": cache_dir, "modalities": ("vision",)}
    experiment, mesh = Experiment.of(config), make_mesh(MeshSpec())
    source = sources.open_source(experiment.data.source, "train", cache_dir)
    stage = run.build_stage(experiment, "pretrain", source.classes, mesh)
    optimizer = optim.build_optimizer(stage.spec.optim, 4)
    state = initialize(stage.model, optimizer, stage.example, 0, stage.spec.ema_decay, mesh)
    before = jax.tree.map(np.asarray, tree.flatten(state.params))
    first, second = (
        codebook.fit_codebook(state, stage, stage.train_batches(source, 0)) for _ in range(2)
    )
    spec = stage.spec.objectives["masked_visual_tokens"]
    # found anew they are the same: a run may stop before it saves
    for branch in (first.params, first.average, second.params):
        for name, leaf in tree.flatten(branch).items():
            if name == "codebook_vision/centres":
                assert leaf.shape == (
                    spec.codebook_size,
                    stage.model.payloads["vision"].payload_size,
                )
                np.testing.assert_array_equal(leaf, first.params["codebook_vision"]["centres"])
            else:
                np.testing.assert_array_equal(leaf, before[name], err_msg=name)
    payloads = codebook.sample_payloads(spec, stage, stage.train_batches(source, 0))
    found, start = (
        np.asarray(each["codebook_vision"]["centres"]) for each in (first.params, state.params)
    )
    apart = [
        np.linalg.norm(payloads[:500, None] - centres[None], axis=-1).min(axis=1).mean()
        for centres in (found, start)
    ]
    assert apart[0] < 0.9 * apart[1], apart
    kept = tree.flatten(optim.decay_mask(state.params))
    assert not kept["codebook_vision/centres"], (
        "nothing shrinks them, and no gradient reaches them (test_objectives.py)"
    )


def test_what_visual_words_cannot_be_made_of() -> None:
    stage = {"num_steps": 1, "objectives": {"masked_visual_tokens": {"modality": "text"}}}
    with pytest.raises(UserError, match="use a modality other than text"):
        Experiment.of({"stages": {"one": stage}})
