# SPDX-License-Identifier: Apache-2.0
"""Weights as people have them: folders that `save_pretrained` wrote, imports, and what is none."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import make_fixtures
import numpy as np
import pytest
import transformer_references as references

import particlejax as pj
from particlejax import main as entry
from particlejax.config.experiment import Experiment
from particlejax.config.job_specs import ImportSpec, LinearProbeSpec, PredictSpec
from particlejax.core import tree
from particlejax.core.typing import UserError
from particlejax.data.video.decode import raw_file
from particlejax.jobs import extract_features, linear_probe, predict
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import (
    config_settings,
    description,
    formats,
    preprocessor_config,
    pretrained_folder,
    transformers_config,
)
from particlejax.models.zoo.convert.transformer_names import KINDS
from particlejax.train import pretrained, published, run_dir, stage

FIXTURES = make_fixtures.FOLDER
ODD = json.loads((FIXTURES / "pretrained_odd.json").read_text())
TINY = json.loads((FIXTURES / "transformers_tiny.json").read_text())
NAMES = ("walk", "run, fast", "jump", "sit", "wave", "clap", "fall")
INDEX = "model.safetensors.index.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 345579424\n"
PAGE = "<!DOCTYPE html>\n<html><body>Sign in</body></html>"


def save(
    folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray], shards: int = 1
) -> Path:
    """Writes a folder as `save_pretrained` does."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        formats.write(folder / "model.safetensors", arrays)
        return folder
    files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    where = {name: files[i % shards] for i, name in enumerate(sorted(arrays))}
    for file in files:
        part = {name: arrays[name] for name, shard in where.items() if shard == file}
        formats.write(folder / file, part)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def odd(folder: Path, kind: str = "videomae", shards: int = 1, **changes: Any) -> Path:
    """A folder of a size that nobody published, as transformers wrote it."""
    entry = ODD[kind]
    return save(
        folder, entry["config"] | changes, references.weights(entry["shapes"], False), shards
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VideoMAE of width 36 and three layers."""
    return odd(tmp_path_factory.mktemp("odd") / "videomae")


@pytest.fixture(scope="module")
def imported(folder: Path) -> Path:
    """The workdir of its import."""
    workdir = folder.parent / "import"
    command = ["--config=experiments/import_weights.py", f"--config.weights={folder}"]
    assert entry.main(["main", *command, f"--workdir={workdir}"]) == 0
    return workdir


# -- sizes, names and class names of config.json


@pytest.mark.parametrize("kind", ODD)
def test_a_folder_of_any_size_answers_as_transformers(kind: str, tmp_path: Path) -> None:
    path = odd(tmp_path / kind, kind, shards=3 if kind == "timesformer" else 1)
    backbone, params, _, report = pretrained.load_pretrained(str(path))
    assert not report.missing and all("predictor" in name for name in report.unused)
    spec = backbone.spec
    assert (spec.name, spec.frames, spec.size, spec.class_names) == (kind, 6, 24, NAMES)
    given = references.inputs(spec.examples, kind)
    answer, _ = jax.jit(backbone.apply)(params, *given)
    wanted = np.array(ODD[kind]["answer"], np.float32)
    np.testing.assert_allclose(answer, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


WIDE = references.WIDE
TUBES = {**WIDE, **references.VIDEO, "patch_size": 8, "tubelet_size": 2}
PRISM = {
    "model_type": "videoprism_vision_model",
    **WIDE,
    **references.VIDEO,
    "tubelet_size": [1, 8, 8],
    "num_spatial_layers": 2,
    "num_temporal_layers": 1,
    "num_auxiliary_layers": 1,
}
JEPA = {
    "model_type": "vjepa2",
    **WIDE,
    "crop_size": 16,
    "frames_per_clip": 4,
    "patch_size": 8,
    "mlp_ratio": 2.0,
    "num_pooler_layers": 1,
    "pred_hidden_size": 24,
    "pred_num_hidden_layers": 1,
    "pred_num_attention_heads": 2,
    "pred_mlp_ratio": 2.0,
    "pred_num_mask_tokens": 3,
}
WORDS = {**WIDE, "vocab_size": 40, "max_position_embeddings": 8}
IMAGE = {**WIDE, "image_size": 16, "patch_size": 8}
# what transformers writes for the tiny references, and defaults that it may leave out
CONFIGS = {
    "videomae_tiny": {"model_type": "videomae", **TUBES},
    "videomae_pretraining_tiny": {
        "model_type": "videomae",
        "architectures": ["VideoMAEForPreTraining"],
        **TUBES,
        "use_mean_pooling": False,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    },
    "vivit_tiny": {"model_type": "vivit", **TUBES, "tubelet_size": [2, 8, 8]},
    "timesformer_tiny": {"model_type": "timesformer", **TUBES},
    "vjepa2_tiny": {"architectures": ["VJEPA2ForVideoClassification"], **JEPA},
    "vjepa2_pretraining_tiny": {"architectures": ["VJEPA2Model"], **JEPA},
    "videoprism_tiny": PRISM,
    "videoprism_text_tiny": {
        "model_type": "videoprism",
        "vision_config": PRISM,
        "text_config": WORDS,
    },
    "ast_tiny": {
        "model_type": "audio-spectrogram-transformer",
        **WIDE,
        "patch_size": 8,
        "frequency_stride": 5,
        "time_stride": 5,
        "max_length": 24,
        "num_mel_bins": 16,
    },
    "bert_tiny": {"model_type": "bert", **WORDS, "max_position_embeddings": 12},
    "clip_tiny": {
        "model_type": "clip",
        "projection_dim": 16,
        "vision_config": IMAGE,
        "text_config": {**WORDS, "eos_token_id": 2},  # as the first configs say: the highest id
    },
    "siglip_tiny": {"model_type": "siglip", "vision_config": IMAGE, "text_config": WORDS},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_recognized_by_its_config(name: str) -> None:
    assert {backbones.find_backbone(each).kind for each in CONFIGS} == set(KINDS)
    config = dict(CONFIGS[name])
    if "architectures" in config:
        config.pop("model_type")
    found = description.Description("config.json", config)
    spec = description.network_of(found, "", config_settings.Keys(), whole=True)
    variant = backbones.find_backbone(name)
    classes = getattr(variant.net, "classes", 0)  # of the weights
    assert spec.name == name and spec.mean == variant.mean and spec.kind == variant.kind
    assert (spec.net.clone(classes=classes) if classes else spec.net) == variant.net


def test_an_image_vit_becomes_a_vivit_of_its_width(tmp_path: Path) -> None:
    vivit = references.weights(ODD["vivit"]["shapes"], False)
    image = {name.replace("vivit.", "vit."): array for name, array in vivit.items()}
    image["vit.embeddings.patch_embeddings.projection.weight"] = np.ones((36, 3, 6, 6), np.float32)
    table = image["vit.embeddings.position_embeddings"][:, :17]
    image["vit.embeddings.position_embeddings"] = table
    config = ODD["vivit"]["config"] | {"model_type": "vit", "patch_size": 6}
    path = save(tmp_path / "vit", config, image)
    with pytest.raises(UserError, match="an image ViT, .* set config.model=vivit"):
        pretrained.load_pretrained(str(path))
    backbone, params, *_ = pretrained.load_pretrained(str(path), "vivit")
    assert backbone.spec.net.size.width == 36 and backbone.spec.net.grid == (16, 4, 4)
    np.testing.assert_allclose(params["positions"][1:17], table[0, 1:], atol=1e-6)


# -- wherever weights are asked for


def test_a_folder_and_its_import_are_named_wherever_weights_are(
    folder: Path, imported: Path, capfd: pytest.CaptureFixture
) -> None:
    results = json.loads((imported / "results.json").read_text())["import"]
    assert results["class_names"] == list(NAMES) and results["model"] == "videomae"
    assert "width 36, depth 3, 3 heads, MLP 50" in (imported / "report.md").read_text()
    clip = raw_file(np.random.default_rng(0).integers(0, 256, (8, 24, 32, 3), np.uint8), 25.0)
    (folder.parent / "clip.mkv").write_bytes(clip)
    probes, answers = [], []
    for weights in map(str, (folder, folder / "model.safetensors", imported)):
        predictor = predict.load_predictor(PredictSpec(weights=weights))
        assert predictor.class_names == NAMES and predictor.backbone.spec.frames == 6
        probes.append(linear_probe.load_backbone(LinearProbeSpec(weights=weights)).identity)
        network = pj.load_backbone(weights=weights)
        answers.append(network.predict(folder.parent / "clip.mkv", top_k=7))
    assert probes[0] == probes[1] == probes[2] and probes[0]["model"] == "videomae"
    assert answers[0] == answers[1] == answers[2] and {name for name, _ in answers[0]} == set(NAMES)
    assert pj.load_backbone(imported).name == "videomae"
    run = ["main", "--config=experiments/predict.py", f"--config.videos={folder.parent}/clip.mkv"]
    assert entry.main([*run, f"--config.weights={imported}", f"--workdir={folder.parent}/p"]) == 0
    said = json.loads((folder.parent / "p" / "results.json").read_text())["predict"]
    assert list(next(iter(said.values())).items())[0] == pytest.approx(answers[0][0])
    spec = extract_features.ExtractFeaturesSpec(weights=str(imported))
    work = extract_features.prepare_extraction(spec, folder.parent / "features")
    assert work.sampling["size"] == 24 and work.width == 36
    capfd.readouterr()


def experiment(init_from: str, stem: str = "") -> Experiment:
    """An experiment that starts from something."""
    model = {"stem": {"model": stem}} if stem else {}
    stages = {"one": {"num_steps": 1, "objectives": {"classify": {}}}}
    return Experiment.of({"init_from": init_from, "model": model, "stages": stages})


def test_a_run_is_not_asked_of_weights_but_a_stem_takes_them(folder: Path, imported: Path) -> None:
    x3d = str(FIXTURES / "x3d_tiny.safetensors")
    for weights in (str(folder), str(imported)):
        for stem in ("", "x3d_tiny"):
            with pytest.raises(
                UserError, match=r"holds published weights \(videomae\), not a run .*linear_probe"
            ):
                stage.inherit_settings(experiment(weights, stem))
        with pytest.raises(UserError, match="holds published weights"):
            pj.load_run(weights)
    with pytest.raises(UserError, match="or, of a 3D CNN, as config.model.stem.weights"):
        stage.inherit_settings(experiment(x3d))
    started = stage.inherit_settings(experiment(x3d, "x3d_tiny"))
    assert started.model.stem.weights == x3d and not started.init_from
    with pytest.raises(UserError, match="both name weights of the stem"):
        stage.inherit_settings(experiment(x3d, "x3d_tiny"), ("model.stem.weights",))
    assert published.network_at(str(folder.parent)) is None


def test_a_workdir_from_before_models_were_recognized_goes_on(tmp_path: Path) -> None:
    run_dir.enter(tmp_path, PredictSpec(model="i3d", videos="a"))
    (tmp_path / "results.json").write_text("{}")
    run_dir.enter(tmp_path, PredictSpec(videos="a"))
    with pytest.raises(UserError, match="holds a run with other settings"):
        run_dir.enter(tmp_path, PredictSpec(model="x3d_m", videos="a"))


def test_a_folder_of_the_hubs_cache_is_its_snapshot(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--user--name"
    for i, revision in enumerate(("abc", "def")):
        shutil.copytree(folder, cache / "snapshots" / revision)
        (cache / "snapshots" / revision / "number").write_text(str(i))
    with pytest.raises(UserError, match="holds 2 snapshots: name one of them"):
        pretrained_folder.snapshot(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("def")
    assert description.describe(cache).file == str(cache / "snapshots" / "def" / "config.json")


def test_shards_of_pytorch_are_read(tmp_path: Path) -> None:
    want = formats.read(FIXTURES / "small.npz")
    shutil.copy(FIXTURES / "small.pyth", tmp_path / "pytorch_model-00001-of-00001.bin")
    listed = dict.fromkeys(want, "pytorch_model-00001-of-00001.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    found = formats.read(tmp_path)
    assert found.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), array)


# -- what is missing or has no use


def test_what_pretraining_leaves_is_said_and_a_head_is_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    name = "videomae_pretraining_tiny"
    arrays = references.weights(TINY[name]["shapes"], False)
    path = save(tmp_path / "mae", CONFIGS[name], arrays)
    network = pj.load_backbone(path)
    said = capfd.readouterr().err
    assert "arrays left out, the decoder of pretraining" in said
    assert "the head is not in it (head/bias, head/kernel)" in said
    assert network.classes == () and not network.backbone.spec.net.mean_pool
    np.testing.assert_array_equal(
        network.params["norm"]["scale"], arrays["videomae.layernorm.weight"]
    )
    with pytest.raises(UserError, match="without a trained classification head: name fine-tuned"):
        predict.load_predictor(PredictSpec(weights=str(path)))
    command = ["main", "--config=experiments/import_weights.py", f"--config.weights={path}"]
    assert entry.main([*command, f"--workdir={tmp_path / 'a'}"]) == 0
    kept = formats.read(tmp_path / "a")
    assert any(key.startswith("decoder.") for key in kept)  # an import keeps all
    assert pj.load_backbone(tmp_path / "a").classes == ()


def test_a_head_for_other_classes_is_new(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    command = ["main", "--config=experiments/import_weights.py", f"--config.weights={folder}"]
    assert entry.main([*command, "--config.num_classes=3", f"--workdir={tmp_path / 'a'}"]) == 0
    said = capfd.readouterr().err
    assert (
        "a new head for 3 classes, randomly initialized, instead of that of the weights for 7"
        in (said)
    )
    arrays, whole = formats.read(tmp_path / "a"), pretrained.load_pretrained(str(folder))[1]
    assert arrays["head.kernel"].shape == (36, 3) and arrays["head.kernel"].std() > 0
    for name, leaf in tree.flatten(whole).items():
        if not name.startswith("head/"):
            np.testing.assert_array_equal(arrays[name.replace("/", ".")], leaf)
    with pytest.raises(UserError, match="without a trained classification head"):
        predict.load_predictor(PredictSpec(weights=str(tmp_path / "a")))


def change_arrays(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Changes the arrays of a folder."""

    def apply(path: Path) -> None:
        arrays = formats.read(path)
        change(arrays)
        formats.write(path / "model.safetensors", arrays)

    return apply


def change_config(**changes: Any) -> Callable[[Path], None]:
    """Changes the config of a folder."""

    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return apply


def change_file(name: str, content: str | bytes | None) -> Callable[[Path], None]:
    """Replaces the content of a file; None: removes it."""

    def apply(path: Path) -> None:
        if content is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def truncate(path: Path) -> None:
    """Takes the end of the weights away."""
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def change_index(**where: str) -> Callable[[Path], None]:
    """Makes shards and changes their index."""

    def apply(path: Path) -> None:
        arrays = formats.read(path)
        formats.write(path / "a.safetensors", arrays)
        (path / "model.safetensors").unlink()
        listed = dict.fromkeys(arrays, "a.safetensors") | {
            key.replace("__", "."): file for key, file in where.items()
        }
        (path / INDEX).write_text(json.dumps({"weight_map": listed}))

    return apply


CASES = {
    "an array of no use": (
        change_arrays(lambda arrays: arrays.update({"adapter.down": np.ones(3, np.float32)})),
        r"do not fit their config.json, 1 arrays have no use \(adapter.down\): fetch .* or name .*"
        r"model.safetensors itself",
    ),
    "an array that is missing": (
        change_arrays(lambda arrays: arrays.pop("fc_norm.weight") is arrays.pop("classifier.bias")),
        r"2 parameters of videomae are not in them \(head_norm/scale, head/bias\)|head/bias",
    ),
    "a layer that is missing": (
        change_config(num_hidden_layers=4),
        "3 of the 4 layers .* fetch both",
    ),
    "a layer too many": (
        change_config(num_hidden_layers=2),
        r"\d+ arrays have no use \(videomae.enc",
    ),
    "another width": (change_config(intermediate_size=51), r"shape \(36, 50\) .* fetch both again"),
    "heads that do not divide": (
        change_config(num_attention_heads=5),
        "5 attention heads for a width",
    ),
    "a number that is none": (
        change_config(hidden_size="wide"),
        "config.json has hidden_size='wide'",
    ),
    "too few class names": (
        change_config(id2label={"0": "a"}),
        "names 1 classes but the head .* has 7",
    ),
    "class names without order": (change_config(id2label={"a": "a"}), "its keys must be 0, 1"),
    "an activation": (change_config(hidden_act="mish"), "hidden_act='mish': choose one of gelu"),
    "gray pictures": (
        change_config(num_channels=1),
        "num_channels=1: the network here has 3 alone",
    ),
    "half a cuboid": (change_config(num_frames=7), "clips of 7 x 24 x 24, which are no multiple"),
    "another library": (
        change_config(model_type="llama"),
        "'llama' .* not known: choose one of vid",
    ),
    "a misspelling": (change_config(model_type="videomea"), "not known: did you mean videomae?"),
    "a pointer": (
        change_file("model.safetensors", LFS),
        "is a git-lfs pointer to 345,579,424 bytes, .* run `git lfs pull`",
    ),
    "a page as weights": (
        change_file("model.safetensors", PAGE),
        "is a web page, .*/resolve/ instead",
    ),
    "a page as config": (change_file("config.json", PAGE), "config.json is a web page"),
    "an answer": (change_file("model.safetensors", '{"error": "no"}'), "is text .* not weights"),
    "half a config": (change_file("config.json", "{"), "config.json cannot be read as JSON"),
    "a truncated file": (truncate, "it is truncated: [0-9,]+ of [0-9,]+ bytes.: fetch it again"),
    "no weights": (
        change_file("model.safetensors", None),
        r"holds config.json\): name a file .*a folder that .*save_pretrained wrote.*import_weights",
    ),
    "a shard that is not there": (
        change_index(x="b.safetensors"),
        "names 2 files, but b.safetensors is",
    ),
    "an array that no shard holds": (
        change_index(x="a.safetensors"),
        "lists x in a.safetensors, which",
    ),
    "a shard of elsewhere": (
        change_index(x="../a.safetensors"),
        "'../a.safetensors' as the file of x",
    ),
    "an index without arrays": (
        lambda path: (change_file("model.safetensors", None)(path), change_file(INDEX, "{}")(path)),
        "lists no arrays",
    ),
    "two channels": (
        change_file("preprocessor_config.json", '{"image_mean": [0.5, 0.5]}'),
        "preprocessor_config.json has image_mean=.*three channels",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_one_sentence(case: str, folder: Path, tmp_path: Path) -> None:
    damage, sentence = CASES[case]
    path = tmp_path / "folder"
    shutil.copytree(folder, path)
    damage(path)
    with pytest.raises(UserError, match=sentence) as caught:
        pretrained.load_pretrained(str(path))
    assert str(caught.value)[-1] in ".?" and "\n" not in str(caught.value)


def test_a_page_saved_as_bin_is_told_from_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text(PAGE)
    with pytest.raises(UserError, match="pytorch_model.bin is a web page"):
        formats.read(tmp_path)
    whole = (FIXTURES / "small.pyth").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="its zip archive is truncated.: fetch it again"):
        formats.read(tmp_path)


def test_a_model_that_the_config_contradicts_is_refused(folder: Path, imported: Path) -> None:
    def load(model: str, weights: Path = folder) -> None:
        predict.load_predictor(PredictSpec(model=model, weights=str(weights)))

    for weights in (folder, imported):
        with pytest.raises(
            UserError, match="config.model='vivit_base' is another architecture than"
        ):
            load("vivit_base", weights)
        with pytest.raises(
            UserError,
            match=r"'videomae_base' has patch \(2, 16, 16\), width 768, .* says patch \(3, 6, 6\), "
            "width 36, depth 3, .*: leave config.model empty",
        ):
            load("videomae_base", weights)
        load("videomae", weights)
    with pytest.raises(UserError, match="name='vivit_base' is another .* leave name empty"):
        pj.load_backbone("vivit_base", folder)
    with pytest.raises(
        UserError, match="config.model is empty, and the weights have no config.json"
    ):
        pretrained.load_pretrained(str(FIXTURES / "x3d_tiny.safetensors"))
    with pytest.raises(UserError, match="does not exist: check .*a name on a hub is not fetched"):
        load("", Path("user/name"))


# -- pixels


def test_pixels_are_scaled_as_the_preprocessor_says(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    shutil.copytree(folder, path)
    processor = {
        "do_center_crop": True,
        "crop_size": {"height": 24, "width": 24},
        "size": {"shortest_edge": 32},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
        "rescale_factor": 1 / 127.5,
        "offset": True,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    network = pj.load_backbone(path)
    spec = network.backbone.spec
    assert spec.short_side == 32
    pixels = np.arange(256, dtype=np.float32).repeat(3).reshape(1, 1, 16, 16, 3)
    wanted = (pixels / 127.5 - 1 - np.float32([0.5, 0.4, 0.3])) / np.float32([0.5, 0.25, 0.2])
    np.testing.assert_allclose(backbones.normalize(spec, pixels), wanted, atol=1e-5)
    plain = description.describe(folder)
    unscaled = description.network_of(plain, "", config_settings.Keys())
    assert unscaled.short_side == 0 and unscaled.mean == (0.485, 0.456, 0.406)
    frames = np.zeros((8, 32, 48, 3), np.uint8)
    frames[:, 4:28, 12:36] = 255  # what a crop of 24 from a short side of 32 shows
    (tmp_path / "clip.mkv").write_bytes(raw_file(frames, 25.0))
    ((shown, _),) = pj.api.windows(str(tmp_path / "clip.mkv"), 6, 24, 1, short_side=32)
    assert shown.shape == (6, 24, 24, 3) and shown.min() > 250
    spec = LinearProbeSpec(weights=str(path))
    assert "settings" in linear_probe.load_backbone(spec).identity
    work = extract_features.prepare_extraction(
        extract_features.ExtractFeaturesSpec(weights=str(path)), tmp_path / "features"
    )
    assert work.sampling["short_side"] == 32
    without = dataclasses.replace(unscaled, size=224)
    for processor, side in (
        ({"size": 292, "crop_size": 256, "do_center_crop": True}, 256),  # as the ratio says
        ({"size": {"height": 224, "width": 224}}, 0),
        ({"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True}, 0),
    ):
        found = preprocessor_config.with_preprocessing(without, processor, "p")
        assert found.short_side == side


def test_caches_tell_networks_of_the_same_weights_apart(tmp_path: Path) -> None:
    name = "videomae_tiny"
    arrays = references.weights(TINY[name]["shapes"], False)
    identities = []
    for i, changes in enumerate(({}, {"num_attention_heads": 2}, {"hidden_act": "relu"})):
        path = save(tmp_path / str(i), CONFIGS[name] | changes, arrays)
        identities.append(linear_probe.load_backbone(LinearProbeSpec(weights=str(path))).identity)
    assert len({json.dumps(identity) for identity in identities}) == 3
    assert "settings" not in identities[0], "features of before are found again"
    assert transformers_config.is_supported(CONFIGS[name])
    assert ImportSpec().model == ""
