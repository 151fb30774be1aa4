# SPDX-License-Identifier: Apache-2.0
"""One battery for every way to fine-tune: what trains, what stays to the last bit, what is saved,
and that merging is no change.
"""

import csv
import dataclasses
import json
import runpy
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from particlejax import main as entry
from particlejax.config.experiment import (
    DataSpec,
    Experiment,
    FinetuneSpec,
    MeshSpec,
    ModelSpec,
    OptimSpec,
    ParticleSpec,
    as_dict,
)
from particlejax.config.objectives import ClassifySpec
from particlejax.core import tree
from particlejax.core.typing import UserError
from particlejax.data import pipeline, sources
from particlejax.distributed import checkpoint, sharding
from particlejax.finetune import partition, peft, restore
from particlejax.models import particle_model as models
from particlejax.models.heads import classification
from particlejax.models.modality import ModalitySpec
from particlejax.nn import attention, transformer
from particlejax.objectives import registry
from particlejax.particles import packing, policies
from particlejax.particles.types import Batch
from particlejax.train import optim
from particlejax.train import stage as run
from particlejax.train.train_state import TrainState, make_step, without_frozen

MODEL = ModelSpec(
    width=16, depth=2, num_heads=2, unroll_layers=False, pool_type="attention", pool_num_heads=2
)
D, N, F, H, C = 16, 2, 64, 2, 4  # width, depth, hidden width of the MLP, heads, classes
HEAD = 2 * D + D * C + C + D * H + H + D * D + D  # norm, head, pool
# Numbers that train beside the head, by hand.
SPECS = {
    "linear_probe": (FinetuneSpec("linear_probe"), 0),
    "attentive_probe": (FinetuneSpec("attentive_probe"), 0),
    "bitfit": (
        FinetuneSpec("bitfit"),
        N * (4 * D + F + D + 2 * D) + D + 2 * D,
    ),  # blocks; the final norm; place and payload
    "lora": (
        FinetuneSpec("lora", lora_rank=2, target_modules="kernel$"),
        N * (4 * (D * 2 + 2 * D) + 2 * (D * 2 + 2 * F)),
    ),
    "ia3": (FinetuneSpec("ia3"), N * (2 * D + F)),
    "adapter": (FinetuneSpec("adapter", adapter_dim=3), N * 2 * (D * 3 + 3 + 3 * D + D)),
    "vpt_shallow": (FinetuneSpec("vpt_shallow", num_virtual_tokens=3), 3 * D),
    "vpt_deep": (FinetuneSpec("vpt_deep", num_virtual_tokens=3), N * 3 * D),
    "prefix": (
        FinetuneSpec("prefix", num_virtual_tokens=3, extra_trainable="norm/(scale|bias)$"),
        N * 2 * 3 * D + N * 4 * D + 2 * D,
    ),
}

PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@cache
def batch(rows: int = 8) -> Batch:
    rng, clips = np.random.default_rng(0), []
    for i in range(rows):
        video = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
        cut = policies.cut_clip(
            video, np.arange(4, dtype=np.float32), ParticleSpec("grid", (2, 4, 4))
        )
        clips.append(packing.Clip({"vision": cut}, i % C, i))
    return packing.pack(clips, range(rows), {"vision": packing.SlotSpec(8, 96)}, rows, 1)


@cache
def base() -> tuple[models.Model, dict]:
    model = models.build(MODEL, {"vision": ModalitySpec(96)}, heads=classification(C))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), sharding.AXES)
    params = jax.jit(model.init)(jax.random.key(0), batch())
    return model, jax.device_put(params, sharding.param_shardings(params, mesh))


@cache
def logits_of(clips: int) -> Any:
    model, _ = base()

    def logits(params: dict, particles: Any) -> jax.Array:
        return model.head(params, "head", model.apply(params, "encode", particles, clips)[0], clips)

    return jax.jit(logits)


def logits(params: dict, particles: Any = None, clips: int = 1) -> np.ndarray:
    return np.asarray(logits_of(clips)(params, particles or batch().particles))


class Tuned(NamedTuple):
    before: TrainState
    after: TrainState
    spec: FinetuneSpec


@cache
def tuned(name: str) -> Tuned:
    """Three steps; all in numpy, whose arithmetic needs no compilation."""
    spec = SPECS[name][0]
    model, params = base()
    optimizer = optim.build_optimizer(OptimSpec("sgd", learning_rate=0.3, warmup_ratio=0.0), 10)

    def start(params: dict) -> TrainState:
        trained, frozen = partition.split(spec, params, jax.random.key(0))
        return TrainState(
            jnp.zeros((), jnp.int32),
            jnp.uint32(0),
            trained,
            optimizer.init(trained),
            trained,
            frozen,
        )

    before = jax.jit(start)(params)
    step = make_step(
        model,
        registry.combine({"classify": ClassifySpec()}),
        optimizer,
        ema=0.5,
        accumulate=1,
        tuning=spec,
    )
    step, after = jax.jit(step), before
    for _ in range(3):
        after, _ = step(after, batch())
    return Tuned(jax.device_get(before), jax.device_get(after), spec)


@cache
def merge_of(spec: FinetuneSpec) -> Any:
    return jax.jit(lambda params, frozen: partition.merge(spec, params, frozen))


def whole(state: TrainState, spec: FinetuneSpec) -> dict:
    return merge_of(spec)(state.params, state.frozen)


def test_the_battery_knows_every_method() -> None:
    assert {spec.method for spec, _ in SPECS.values()} | {"full"} == set(peft.METHODS)
    names = next(f for f in dataclasses.fields(FinetuneSpec) if f.name == "method").metadata[
        "names"
    ]
    assert set(names) == set(peft.METHODS)


@pytest.mark.parametrize("name", SPECS)
def test_exactly_what_trains_changes(name: str) -> None:
    """Gradients reach every trained parameter; a frozen one is the same to the last bit and has no
    state in the optimiser.
    """
    before, after, _ = tuned(name)
    assert tree.count(after.params) == HEAD + SPECS[name][1]
    first = tree.flatten(before.params)
    for path, leaf in tree.flatten(after.params).items():
        if not path.endswith(("key/bias", "score/bias")):  # softmax takes no notice of either
            each = np.abs(leaf - first[path])
            each = (
                each.reshape(each.shape[0], -1)
                if "blocks/" in path or "tuned/" in path
                else each.reshape(1, -1)
            )
            assert (each.max(axis=1) > 0).all(), path
    assert tree.flatten(before.frozen).keys() == tree.flatten(after.frozen).keys()
    start = tree.flatten(jax.device_get(base()[1]))
    for path, leaf in tree.flatten(after.frozen).items():
        np.testing.assert_array_equal(leaf, start[path], err_msg=path)
    assert tree.count(after.opt_state) == tree.count(after.params) + 1, (
        "a momentum of each and a counter"
    )
    assert tree.count(partition.base_params(after.params, after.frozen)) == tree.count(base()[1])


@pytest.mark.parametrize("name", SPECS)
def test_it_begins_as_the_base(name: str) -> None:
    before, _, spec = tuned(name)
    same = np.array_equal(logits(whole(before, spec)), logits(base()[1]))
    assert same == (name not in ("prefix", "vpt_shallow", "vpt_deep")), (
        "these are read from the start"
    )


@pytest.mark.parametrize("name", SPECS)
def test_saved_it_is_small_and_together_with_its_base_the_same(name: str, tmp_path: Path) -> None:
    """What a checkpoint holds, and what is read of it: the merged parameters give the outputs of
    those that were trained.
    """
    _, after, spec = tuned(name)
    write(tmp_path / "base", {"params": base()[1]}, {})
    write(
        tmp_path / "tuned",
        without_frozen(after),
        {restore.BASE_KEY: restore.reference(tmp_path / "base", tmp_path / "tuned", spec)},
    )
    one = checkpoint.Checkpoints(tmp_path / "tuned", 2)
    _, again, _ = one.restore(
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=PLACE), without_frozen(after)
        )
    )
    one.close()
    jax.tree.map(np.testing.assert_array_equal, again, without_frozen(after))
    names = checkpoint.load_arrays(tmp_path / "tuned")
    assert sum(each.size for each in names.values()) == tree.count(after.params)
    found, sentence = restore.from_checkpoint(base()[1], tmp_path / "tuned")
    expected = logits(whole(dataclasses.replace(after, params=after.average), spec))
    np.testing.assert_allclose(logits(found), expected, atol=1e-5)
    assert f"({spec.method}); base: " in sentence
    assert np.abs(expected - logits(base()[1])).max() > 1e-3, (
        "it has learnt something that merging could lose"
    )
    write(tmp_path / "base", {"params": base()[1]}, {}, step=1)
    with pytest.raises(UserError, match="has been trained since"):
        restore.from_checkpoint(base()[1], tmp_path / "tuned")


def write(folder: Path, state: Any, data: dict, step: int = 0) -> None:
    kept = checkpoint.Checkpoints(folder, 2)
    kept.save(step, state, data)
    kept.close()


@pytest.mark.parametrize("name", ["adapter", "prefix", "vpt_shallow", "vpt_deep"])
def test_packed_rows_stay_their_clips_own(name: str) -> None:
    _, after, spec = tuned(name)
    params, each = whole(after, spec), batch().particles["vision"]
    two = jax.tree.map(lambda x: np.concatenate([x[:1], x[1:2], 0 * x[:1]], axis=1), each)
    two.segment[0, 8:16] = 2
    packed = logits(params, {"vision": two}, 2)[0]
    np.testing.assert_allclose(packed, logits(params)[:2, 0], atol=2e-5)


def test_lora_is_a_product_beside_the_kernel() -> None:
    """x W + alpha / rank (x a) b, computed apart, for a kernel of every shape."""
    spec = FinetuneSpec("lora", lora_rank=3, lora_alpha=5.0, target_modules="kernel$")
    flat = tree.flatten(tuned("lora").before.frozen)
    extra = peft.lora_init(jax.random.key(0), flat, spec)
    extra |= {
        path: jax.random.normal(jax.random.key(1), leaf.shape)
        for path, leaf in extra.items()
        if path.endswith("/b")
    }
    merged = peft.lora_merge(flat, extra, spec)
    changed = {path for path in flat if merged[path] is not flat[path]}
    assert len(changed) == 6 and all(path.startswith(peft.BLOCKS_PREFIX) for path in changed)
    for path in changed:
        a, b = extra[f"{path}/a"], extra[f"{path}/b"]
        x = np.random.default_rng(0).normal(size=(2, 5, a.shape[1])).astype(np.float32)
        apart = x @ np.reshape(flat[path], (N, a.shape[1], -1)) + (x @ np.asarray(a)) @ np.asarray(
            b
        ) * (5 / 3)
        np.testing.assert_allclose(
            x @ np.reshape(merged[path], (N, a.shape[1], -1)), apart, atol=1e-4, err_msg=path
        )
    with pytest.raises(UserError, match="matches no kernel"):
        peft.lora_init(jax.random.key(0), flat, FinetuneSpec("lora", target_modules="atention"))


def test_ia3_is_a_factor_of_what_flows() -> None:
    flat = tree.flatten(tuned("ia3").before.frozen)
    factor = {
        path: jnp.full_like(leaf, 0.5)
        for path, leaf in peft.ia3_init(jax.random.key(0), flat, FinetuneSpec("ia3")).items()
    }
    merged = peft.ia3_merge(flat, factor, FinetuneSpec("ia3"))
    for part in ("attention/key", "attention/value"):
        for leaf in ("kernel", "bias"):
            np.testing.assert_allclose(
                merged[f"{peft.BLOCKS_PREFIX}{part}/{leaf}"],
                1.5 * flat[f"{peft.BLOCKS_PREFIX}{part}/{leaf}"],
            )
    np.testing.assert_allclose(
        merged[f"{peft.BLOCKS_PREFIX}mlp/down/kernel"],
        1.5 * flat[f"{peft.BLOCKS_PREFIX}mlp/down/kernel"],
    )
    assert (
        merged[f"{peft.BLOCKS_PREFIX}mlp/down/bias"] is flat[f"{peft.BLOCKS_PREFIX}mlp/down/bias"]
    )


def test_deep_prompts_are_tokens_that_every_block_has_of_its_own() -> None:
    """One block over prompts and tokens, the prompts' outputs left out, and the block that reads
    what the merge makes of them.
    """
    block = transformer.Block(D, 2, F, attention.BlockConfig(distance_bias=False, qk_norm=True))
    rng = np.random.default_rng(0)
    x, token = (rng.normal(size=(n, 5, D)).astype(np.float32) for n in (2, 1))

    def where(queries: int, keys: int) -> attention.AttentionContext:
        return attention.AttentionContext(
            jnp.zeros((2, queries, 3)), jnp.zeros((2, keys, 3)), jnp.ones((2, queries, keys), bool)
        )

    params = block.init(jax.random.key(0), x, where(5, 5))["params"]
    params = tree.map_named(
        lambda name, leaf: leaf + 0.3 * jax.random.normal(jax.random.key(len(name)), leaf.shape),
        params,
    )
    stacked = {peft.BLOCKS_PREFIX + name: leaf[None] for name, leaf in tree.flatten(params).items()}
    merged = peft.prompt_deep_merge(
        stacked, {peft.PEFT_PREFIX + "prompt/token": token}, FinetuneSpec("vpt_deep")
    )
    prefix = {
        name.removeprefix(peft.PEFT_PREFIX): leaf[0]
        for name, leaf in merged.items()
        if name.startswith(peft.PEFT_PREFIX)
    }
    assert set(prefix) == {"attention/prefix/key", "attention/prefix/value"}
    found = block.apply({"params": tree.nest({**tree.flatten(params), **prefix})}, x, where(5, 5))
    both = np.concatenate([np.repeat(token, 2, axis=0), x], axis=1)
    np.testing.assert_allclose(
        found, block.apply({"params": params}, both, where(10, 10))[:, 5:], atol=1e-5
    )


@pytest.mark.parametrize("pool", ["attention", "cls"])
def test_prompts_leave_the_particles_their_places(pool: str) -> None:
    """As many tokens as before, in their order, however a clip is pooled; and what a block says is
    said of particles alone.
    """
    model = models.build(
        dataclasses.replace(MODEL, pool_type=pool),
        {"vision": ModalitySpec(96)},
        heads=classification(C),
    )
    params = jax.jit(model.init)(jax.random.key(0), batch())
    merged = {**params, "encoder": {**params["encoder"], "prompts": {"token": jnp.ones((3, D))}}}
    encode = jax.jit(lambda p: model.apply(p, "encode", batch().particles, 1))
    (before, _), (after, outputs) = encode(params), encode(merged)
    assert after.x.shape == before.x.shape and outputs["blocks"][0].shape == (N, 8, 8, D)
    np.testing.assert_array_equal(after.place, before.place)
    np.testing.assert_array_equal(after.segment, before.segment)
    assert np.abs(after.x - before.x).max() > 1e-3
    if pool == "cls":
        assert after.cls.shape == before.cls.shape and np.abs(after.cls - before.cls).max() > 1e-3


def test_prompts_want_blocks_that_all_modalities_share() -> None:
    stages = {
        "one": {
            "num_steps": 1,
            "objectives": {"classify": {}},
            "finetune": {"method": "vpt_shallow"},
        }
    }
    with pytest.raises(UserError, match="or finetune.method to 'vpt_deep'"):
        Experiment.of({"stages": stages, "model": {"fusion": "late"}})
    with pytest.raises(UserError, match="set model.share_encoder=True"):
        Experiment.of({"stages": stages, "model": {"share_encoder": False}})


def test_layers_train_at_their_rate_from_their_time_on() -> None:
    """Layer-wise decay and gradual unfreezing: before its time a block is the same to the last
    bit.
    """
    params = {
        "encoder": {
            "place": {"kernel": jnp.ones(2)},
            "transformer": {"blocks": {"kernel": jnp.ones((3, 2))}, "norm": {"scale": jnp.ones(2)}},
        },
        "head": {"kernel": jnp.ones(2)},
        "extra": {"encoder": {"transformer": {"blocks": {"a": jnp.ones((3, 2))}}}},
    }
    plain = OptimSpec(
        "sgd",
        learning_rate=1.0,
        warmup_ratio=0.0,
        final_lr_ratio=1.0,
        weight_decay=0.0,
        momentum=0.0,
        grad_clip_norm=0.0,
    )

    def changes(spec: FinetuneSpec, steps: int) -> dict[str, np.ndarray]:
        optimizer, now = (
            optim.build_optimizer(plain, 12, optim.layerwise_decay(spec, 3, 12)),
            params,
        )
        state = optimizer.init(now)
        for _ in range(steps):
            updates, state = optimizer.update(jax.tree.map(jnp.ones_like, now), state, now)
            now = jax.tree.map(jnp.add, now, updates)
        return {name: 1 - np.asarray(leaf)[..., 0] for name, leaf in tree.flatten(now).items()}

    decayed = changes(FinetuneSpec(layer_decay=0.5), 1)
    for name in ("encoder/transformer/blocks/kernel", "extra/encoder/transformer/blocks/a"):
        np.testing.assert_allclose(decayed[name], [1 / 8, 1 / 4, 1 / 2])
    assert (
        decayed["encoder/place/kernel"] == 1 / 16
        and decayed["head/kernel"] == decayed["encoder/transformer/norm/scale"] == 1
    )
    # of 12 steps: the blocks begin at 2, 4 and 6, the embedding at 8
    gradual = FinetuneSpec(gradual_unfreeze_fraction=2 / 3)
    assert optim.layerwise_decay(FinetuneSpec(), 3, 12) is None
    for steps, bottom, middle, top, place in (
        (2, 0, 0, 0, 0),
        (3, 0, 0, 1, 0),
        (5, 0, 1, 3, 0),
        (9, 3, 5, 7, 1),
    ):
        found = changes(gradual, steps)
        np.testing.assert_array_equal(
            found["encoder/transformer/blocks/kernel"], [bottom, middle, top]
        )
        assert found["encoder/place/kernel"] == place and found["head/kernel"] == steps


def command(cache_dir: str, workdir: Path, *more: str) -> list[str]:
    return [
        "main",
        "--config=experiments/finetune.py:tiny",
        f"--config.data.cache_dir={cache_dir}",
        "--config.log.every_steps=1",
        "--config.model.unroll_layers=False",
        "--workdir",
        str(workdir),
        *more,
    ]


def predictions(path: Path) -> np.ndarray:
    rows = csv.DictReader(path.read_text().splitlines())
    return np.array([[float(v) for k, v in row.items() if k.startswith("p:")] for row in rows])


@pytest.fixture(scope="module")
def grounds(cache_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run 'base' that has only been born, and a run 'alone' that tunes adapters
    upon it.
    """
    folder = tmp_path_factory.mktemp("tuned")
    config = runpy.run_path("experiments/finetune.py")["get_config"]("tiny").to_dict()
    experiment = Experiment.of(config | {"data": config["data"] | {"cache_dir": cache_dir}})
    source = sources.open_source("toybox:tiny", "train", cache_dir)
    stage = run.build_stage(experiment, "finetune", source.classes)
    (folder / "base").mkdir()
    checkpoint.write_json(folder / "base" / run.CONFIG, json.loads(json.dumps(as_dict(experiment))))
    params = jax.jit(stage.model.init)(jax.random.key(5), stage.example)
    write(
        run.checkpoint_folder(folder / "base", "finetune"),
        {"params": params},
        {"classes": list(source.classes)},
    )
    assert (
        entry.main(
            command(cache_dir, folder / "alone", f"--config.init_from={folder}/base", *ADAPTER)
        )
        == 0
    )
    return folder


ADAPTER = (
    "--config.stages.finetune.finetune.method=adapter",
    "--config.model.dropout=0.1",
    "--config.stages.finetune.ema_decay=0.5",
    "--config.stages.finetune.robust.sam_rho=0.05",
    "--config.stages.finetune.optim.learning_rate=0.05",
)


def test_a_run_that_tunes_a_part_counts_it_and_resumes_exactly(
    grounds: Path, cache_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, workdir, alone = pipeline.read_batches, tmp_path / "run", grounds / "alone"

    def failing(
        batches: pipeline.TrainBatches, start: int, stop: int, data: DataSpec
    ) -> Iterator[pipeline.LoadedBatch]:
        for k, loaded in enumerate(read(batches, start, stop, data), start):
            if k == 2:
                raise UserError("a process that decodes was killed")
            yield loaded

    again = command(cache_dir, workdir, f"--config.init_from={grounds}/base", *ADAPTER)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "read_batches", failing)
        assert entry.main(again) == 2
    assert entry.main(again) == 0
    for name in ("metrics.jsonl", "predictions_finetune_val.csv"):
        assert (workdir / name).read_bytes() == (alone / name).read_bytes(), name
    parts = json.loads((alone / "results.json").read_text())["finetune"]["train"]
    assert (
        parts["num_saved_params"] == parts["num_trainable_params"] < 0.5 * parts["num_params"]
        and parts["compilations"] == 1
    )
    held = checkpoint.load_arrays(run.checkpoint_folder(alone, "finetune"))
    assert sum(each.size for each in held.values()) == parts["num_saved_params"]
    base = checkpoint.load_arrays(run.checkpoint_folder(grounds / "base", "finetune"))
    assert sum(each.size for each in base.values()) == parts["num_params"]


def test_merged_it_is_a_run_that_says_the_same(
    grounds: Path, cache_dir: str, tmp_path: Path
) -> None:
    """The soup of one run alone is its export: without the base it answers as the run did."""
    # what it builds on moves with it
    moved = shutil.copytree(grounds, tmp_path / "moved") / "alone"
    soup = [
        "main",
        "--config=experiments/model_soup.py:tiny",
        f"--config.data.cache_dir={cache_dir}",
        f"--config.runs=('{moved}',)",
    ]
    assert entry.main([*soup, "--workdir", str(tmp_path / "s")]) == 0
    said = predictions(grounds / "alone" / "predictions_finetune_val.csv")
    np.testing.assert_allclose(predictions(tmp_path / "s" / "predictions.csv"), said, atol=1e-5)
    mesh = sharding.make_mesh(MeshSpec())
    one, merged = (
        jax.device_get(run.load_trained(str(each), mesh, {})[1])
        for each in (moved, tmp_path / "s/model")
    )
    jax.tree.map(np.testing.assert_array_equal, one, merged)
    adapters = {
        path: leaf
        for path, leaf in tree.flatten(merged).items()
        if path.startswith(peft.PEFT_PREFIX)
    }
    assert len(adapters) == 8 and all(np.abs(leaf).max() > 0 for leaf in adapters.values())
    plain = tree.nest(
        {
            path: leaf
            for path, leaf in tree.flatten(run.load_trained(str(moved), mesh, {})[1]).items()
            if path not in adapters
        }
    )
    with pytest.raises(
        UserError,
        match="has adapters, prefixes or prompts in its encoder, which this model would ignore",
    ):
        restore.from_checkpoint(plain, run.checkpoint_folder(tmp_path / "s/model", "finetune"))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (["finetune.method=attentive_probe"], "set it to 'attention'"),
        (["finetune.method=lora"], "freezes the encoder, but no pretrained run is given"),
        (["finetune.method=loro"], "choose one of full, linear"),
        (
            ["finetune.freeze=payload_visoin"],
            "finetune.freeze='payload_visoin' matches no parameter",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    changes: list[str], sentence: str, cache_dir: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    more = [f"--config.stages.finetune.{each}" for each in changes]
    assert entry.main(command(cache_dir, tmp_path, *more)) == 2
    assert sentence in capfd.readouterr().err.strip().splitlines()[-1]
