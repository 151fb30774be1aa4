# SPDX-License-Identifier: Apache-2.0
"""A 3D CNN inside the step: its tokens are its features, it trains or stays to the last bit, and
published weights arrive in it.
"""

import dataclasses
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import make_fixtures
import numpy as np
import pytest

from particlejax import main as entry
from particlejax.config.experiment import (
    Experiment,
    FinetuneSpec,
    ModelSpec,
    OptimSpec,
    ParticleSpec,
    StemSpec,
    as_dict,
)
from particlejax.config.objectives import ClassifySpec
from particlejax.core import tree
from particlejax.core.typing import UserError
from particlejax.distributed import checkpoint
from particlejax.finetune import partition
from particlejax.models import cnn_stem
from particlejax.models import particle_model as models
from particlejax.models.heads import classification
from particlejax.models.modality import ModalitySpec
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import formats
from particlejax.objectives import registry
from particlejax.particles import packing, policies
from particlejax.particles.types import Batch
from particlejax.train import optim, pretrained, stage
from particlejax.train.train_state import TrainState, make_step

BASE, SIZE = (4, 32, 32), 4 * 32 * 32 * 3
MODEL = ModelSpec(
    width=16,
    depth=1,
    num_heads=2,
    unroll_layers=False,
    stem=StemSpec("x3d_tiny", "stage1", "random"),
)
ENDS = {
    "c3d_tiny": "pool4",
    "i3d_tiny": "Conv3d_2c_3x3",
    "i3d_r50_tiny": "stage1",
    "x3d_tiny": "stage1",
}


@cache
def batch() -> Batch:
    rng, clips = np.random.default_rng(0), []
    for i in range(2):
        cut = policies.cut_clip(
            rng.normal(size=(8, 32, 32, 3)).astype(np.float32),
            np.arange(8, dtype=np.float32),
            ParticleSpec("grid", BASE),
        )
        clips.append(packing.Clip({"vision": cut}, i, i))
    return packing.pack(clips, range(2), {"vision": packing.SlotSpec(3, SIZE)}, 2, 1)


def drawn(shapes: dict) -> dict:
    """Parameters as `backbones.drawn` draws them, with nothing to compile."""
    rng = np.random.default_rng(0)

    def leaf(name: str, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if name.endswith("kernel"):
            return rng.normal(0, np.sqrt(2 * shape.shape[-1] / shape.size), shape.shape).astype(
                np.float32
            )
        return (np.ones if name.endswith(("scale", "var")) else np.zeros)(shape.shape, np.float32)

    return tree.map_named(leaf, shapes)


@pytest.mark.parametrize("name", ENDS)
def test_a_token_is_what_the_network_says_of_the_sub_clip(name: str) -> None:
    """Of the whole published network, with the stem's parameters in it, the same features, and
    nothing of what comes after.
    """
    spec, base = StemSpec(name, ENDS[name]), (16, 32, 32)
    payload = np.random.default_rng(0).normal(size=(1, 2, 16 * 32 * 32 * 3)).astype(np.float32)
    module, whole = (
        cnn_stem.CNNStem(spec, base, 8),
        backbones.build_backbone(backbones.find_backbone(name)),
    )
    params = drawn(jax.eval_shape(module.init, jax.random.key(0), payload)["params"])
    every = tree.flatten(drawn(backbones.parameter_shapes(whole)))
    own = tree.flatten(params["network"])
    assert set(own) < set(every) and not any(path.startswith("head") for path in own)

    @jax.jit
    def both(params: dict, payload: jax.Array) -> tuple:
        maps = whole.apply(
            tree.nest({**every, **tree.flatten(params["network"])}), payload.reshape(2, *base, 3)
        )[1][ENDS[name]]
        norm = maps.mean(axis=(1, 2, 3)) - maps.mean(axis=(1, 2, 3, 4))[:, None]
        norm /= jnp.sqrt(jnp.square(norm).mean(axis=1, keepdims=True) + 1e-6)
        return norm @ params["project"]["kernel"], module.apply({"params": params}, payload)[0]

    wanted, found = both(params, payload)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@cache
def states(tuning: FinetuneSpec) -> tuple[TrainState, TrainState]:
    """Before and after two steps. Weight decay is strong where something must stay, and none where
    gradients alone shall move.
    """
    # compiles sooner
    small = dataclasses.replace(MODEL, stem=dataclasses.replace(MODEL.stem, endpoint="stem"))
    model = models.build(
        small if tuning.freeze else MODEL,
        {"vision": ModalitySpec(SIZE, patch_size=BASE)},
        heads=classification(2),
    )
    spec = OptimSpec(
        learning_rate=0.1, warmup_ratio=0.0, weight_decay=0.5 if tuning.freeze else 0.0
    )
    optimizer = optim.build_optimizer(spec, 10, freeze=tuning.freeze)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), batch()))
    step = jax.jit(
        make_step(
            model,
            registry.combine({"classify": ClassifySpec()}),
            optimizer,
            ema=0.0,
            accumulate=1,
            tuning=tuning,
        )
    )
    trained, frozen = partition.split(tuning, params, jax.random.key(0))
    before = TrainState(
        jnp.zeros((), jnp.int32),
        jnp.uint32(0),
        trained,
        jax.jit(optimizer.init)(trained),
        (),
        frozen,
    )
    after, _ = step(before, batch())
    after, metrics = step(after, batch())
    assert np.isfinite(metrics["loss"])
    return before, after


@pytest.mark.parametrize("freeze", ["", "payload_vision/network"])
def test_it_trains_or_stays_to_the_last_bit(freeze: str) -> None:
    tuning = FinetuneSpec(freeze=freeze)
    before, after = states(tuning)
    first, network = tree.flatten(before.params), 0
    for path, leaf in tree.flatten(after.params).items():
        same = np.array_equal(leaf, first[path])
        if path.startswith(cnn_stem.PATH):
            network += leaf.size
            assert same == bool(freeze or path.endswith(("mean", "var"))), path
        elif not path.endswith("key/bias"):
            assert not same, path
    every = tree.count(after.params)
    assert partition.count_trainable(tuning, after.params) == every - bool(freeze) * network
    moments = sum(
        leaf.size for path, leaf in tree.flatten(after.opt_state).items() if "/mu/" in path
    )
    assert moments == every - bool(freeze) * network > 0, "no moments of what does not train"


def test_gradients_reach_every_parameter() -> None:
    """Every channel's, but those of a ReLU that is below zero everywhere."""
    _, after = states(FinetuneSpec())
    moments = {
        path.split("/mu/")[1]: leaf
        for path, leaf in tree.flatten(after.opt_state).items()
        if "/mu/" in path
    }
    own = {
        path: np.asarray(leaf) for path, leaf in moments.items() if path.startswith(cnn_stem.PATH)
    }
    assert (
        set(own)
        == {path for path in tree.flatten(after.params) if path.startswith(cnn_stem.PATH)}
        != set()
    )
    for path, leaf in own.items():
        assert (np.mean(leaf != 0) > 0.5) == (not path.endswith(("mean", "var"))), path


@pytest.mark.parametrize(
    "spec, base, sentence",
    [
        (StemSpec("videomae_tiny"), BASE, "is no 3D CNN"),
        (StemSpec("x3d_tin"), BASE, "did you mean x3d_tiny"),
        (
            StemSpec("x3d_tiny", "stage9"),
            BASE,
            "not a feature map of x3d_tiny: choose one of last, project, stage1",
        ),
        (StemSpec("x3d_tiny"), (), "add it to config.data.modalities"),
        (StemSpec("c3d_tiny", "conv5b"), (2, 8, 8), "too small for c3d_tiny"),
    ],
)
def test_what_cannot_be_read_is_refused(
    spec: StemSpec, base: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        payloads = (
            {"vision": ModalitySpec(1, patch_size=base)} if base else {"audio": ModalitySpec(4)}
        )
        models.build(dataclasses.replace(MODEL, stem=spec), payloads)


def command(cache_dir: str, workdir: Path, *more: str) -> list[str]:
    return [
        "main",
        "--config=experiments/finetune_cnn.py:tiny",
        f"--config.data.cache_dir={cache_dir}",
        "--workdir",
        str(workdir),
        "--config.eval.splits=()",
        *more,
    ]


def test_published_weights_are_read_kept_and_handed_on(
    cache_dir: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Imported, then frozen in a run, then trained in a run that starts from that."""
    params = drawn(
        backbones.parameter_shapes(backbones.build_backbone(backbones.find_backbone("x3d_tiny")))
    )
    kept = checkpoint.Checkpoints(stage.checkpoint_folder(tmp_path / "import", "import"), 2)
    kept.save(0, {"params": params}, {"model": "x3d_tiny"})
    kept.close()
    weights = f"--config.model.stem.weights={tmp_path}/import"
    still = "--config.stages.finetune.finetune.freeze=payload_vision/network"
    assert entry.main(command(cache_dir, tmp_path / "frozen", weights, still)) == 0
    assert "arrays of x3d_tiny from" in capfd.readouterr().err
    figures = json.loads((tmp_path / "frozen" / "results.json").read_text())["finetune"]["train"]
    held = checkpoint.load_arrays(stage.checkpoint_folder(tmp_path / "frozen", "finetune"))
    held = {
        path.removeprefix(cnn_stem.PATH): leaf
        for path, leaf in held.items()
        if path.startswith(cnn_stem.PATH)
    }
    assert figures["num_params"] - figures["num_trainable_params"] == sum(
        leaf.size for leaf in held.values()
    )
    assert figures["compilations"] == 1
    (tmp_path / "frozen" / "results.json").unlink()
    assert entry.main(command(cache_dir, tmp_path / "frozen", weights, still)) == 0
    assert "continuing at step 2" in capfd.readouterr().err, (
        "a state without some moments is restored"
    )
    for path, leaf in held.items():
        np.testing.assert_allclose(leaf, tree.flatten(params)[path], rtol=1e-6, err_msg=path)
    assert (
        entry.main(
            command(cache_dir, tmp_path / "on", f"--config.init_from={tmp_path}/frozen", weights)
        )
        == 0
    )
    trained = checkpoint.load_arrays(stage.checkpoint_folder(tmp_path / "on", "finetune"))
    apart = [
        np.abs(trained[cnn_stem.PATH + path] - leaf).max()
        for path, leaf in held.items()
        if path.endswith("kernel")
    ]
    assert 0 < min(apart) and max(apart) < 0.1, "it went on from there"


@pytest.mark.parametrize(
    "data, weights, sentence",
    [
        (
            {"temporal_mean_scale": 0.4},
            "fixture",
            "need config.data.image_mean, image_std and temporal_mean_scale",
        ),
        ({}, "", "there are no weights for x3d_tiny: add --config.model.stem.weights"),
        ({}, "/no/such.npz", "/no/such.npz does not exist"),
        ({}, "part", r"part.npz lacks 1 parameters of x3d_tiny \(stem_space/kernel"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    data: dict, weights: str, sentence: str, tmp_path: Path
) -> None:
    arrays = formats.read(make_fixtures.FOLDER / "x3d_tiny.safetensors")
    formats.write(
        tmp_path / "part.npz",
        {name: each for name, each in arrays.items() if name != "blocks.0.conv.conv_t.weight"},
    )
    path = {
        "fixture": str(make_fixtures.FOLDER / "x3d_tiny.safetensors"),
        "part": str(tmp_path / "part.npz"),
    }.get(weights, weights)
    model = as_dict(dataclasses.replace(MODEL, stem=dataclasses.replace(MODEL.stem, weights=path)))
    experiment = Experiment.of(
        {
            "data": {"num_frames": 8, "image_size": 32, "image_mean": 0.45, "image_std": 0.225}
            | data,
            "particles": {"policy": "grid", "patch_size": BASE},
            "model": model,
            "stages": {"one": {"num_steps": 1, "objectives": {"classify": {}}}},
        }
    )
    with pytest.raises(UserError, match=sentence):
        pretrained.with_stem_weights(
            states(FinetuneSpec())[0], stage.build_stage(experiment, "one", ("a", "b"))
        )
