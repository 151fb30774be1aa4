# SPDX-License-Identifier: Apache-2.0
"""YAMNet against its definition and its real weights; sound and words of frozen networks as
particles beside each other.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from particlejax import main as entry
from particlejax.config.experiment import DataSpec, FeatureSpec
from particlejax.data import clips, sources
from particlejax.data.modalities import feature_reader
from particlejax.jobs import extract_features as job
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import formats, names
from particlejax.models.zoo.yamnet import YAMNet
from particlejax.train import pretrained

REAL = Path(__file__).parents[1] / ".." / "shared" / "weights" / "yamnet-audioset-int8"


def reference(arrays: dict[str, np.ndarray], sound: np.ndarray, net: YAMNet) -> np.ndarray:
    """Logits of one example by the arrays of a TFLite file, in plain numpy."""
    starts = range(0, len(sound) - net.window + 1, net.hop)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(net.window) / net.window)
    seen = np.abs(
        np.fft.rfft(
            [sound[at : at + net.window] * hann for at in starts], 2 * (net.frequencies - 1)
        )
    )
    x = np.log(seen @ arrays["fc00.w"].T + arrays["fc00.b"] + 0.001)[..., None]

    def slide(x: np.ndarray, stride: int, tap: callable) -> np.ndarray:
        size = [-(-n // stride) for n in x.shape[:2]]
        # as TensorFlow's SAME
        pads = [max((m - 1) * stride + 3 - n, 0) for m, n in zip(size, x.shape, strict=False)]
        x = np.pad(x, [(p // 2, p - p // 2) for p in pads] + [(0, 0)])
        return sum(
            tap(
                x[i : i + size[0] * stride : stride, j : j + size[1] * stride : stride][
                    : size[0], : size[1]
                ],
                i,
                j,
            )
            for i in range(3)
            for j in range(3)
        )

    x = np.maximum(
        slide(x, 2, lambda x, i, j: x @ arrays["conv01.w"][:, i, j].T) + arrays["conv01.b"], 0
    )
    at = 2
    for _, stride in net.blocks:
        deep, kernel = arrays[f"dw{at:02}.w"], arrays[f"conv{at + 1:02}.w"]
        x = np.maximum(
            slide(x, stride, lambda x, i, j, deep=deep: x * deep[0, i, j]) + arrays[f"dw{at:02}.b"],
            0,
        )
        x = np.maximum(x @ kernel[:, 0, 0].T + arrays[f"conv{at + 1:02}.b"], 0)
        at += 2
    return x.mean((0, 1)) @ arrays[f"fc{at:02}.w"].T + arrays[f"fc{at:02}.b"]


def test_int8_weights_say_what_their_definition_says_and_go_out_again(tmp_path: Path) -> None:
    backbone = backbones.build_backbone(backbones.find_backbone("yamnet_tiny"))
    known = names.names_of("yamnet", backbones.parameter_shapes(backbone))
    rng, stored, real = np.random.default_rng(0), {}, {}
    for name, array in names.export_params(
        jax.jit(backbone.init)(jax.random.key(0)), known, names.Report()
    ).items():
        array = rng.normal(size=array.shape).astype(np.float32) * (0.1 if name != "fc00.w" else 1)
        # filters, as magnitudes have a logarithm
        array = np.abs(array) if name.startswith("fc00") else array
        if name.endswith(".w") and name != "conv01.w":
            axis = 3 if name.startswith("dw") else 0
            scale = rng.uniform(0.5, 1.5, array.shape[axis]).astype(np.float32) / 127
            whole = np.clip(np.rint(array * 100), -127, 127).astype(np.int8)
            stored |= {name: whole, f"{name[:-2]}.scale": scale}
            real[name] = whole * np.expand_dims(scale, [i for i in range(array.ndim) if i != axis])
        else:
            stored[name] = real[name] = array
    np.savez(tmp_path / "tiny.npz", **stored)
    backbone, params, known, report = pretrained.load_pretrained(
        str(tmp_path / "tiny.npz"), "yamnet_tiny"
    )
    assert not report.missing and not report.unused and not report.reshaped
    sound = rng.normal(size=backbone.spec.net.samples).astype(np.float32) * 0.1
    logits = np.asarray(jax.jit(backbone.apply)(params, sound[None])[0][0])
    np.testing.assert_allclose(
        logits, reference(real, sound, backbone.spec.net), rtol=1e-4, atol=1e-4
    )
    formats.write(tmp_path / "out.npz", names.export_params(params, known, report))
    _, again, _, _ = pretrained.load_pretrained(str(tmp_path / "out.npz"), "yamnet_tiny")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_real_weights_hear_what_the_original_heard() -> None:
    """The original computes in 8 bits: its scores are near only, and what is faint in its spectra
    is nothing.
    """
    if not (REAL / "yamnet_int8.npz").exists():
        pytest.skip("no real weights here")
    backbone, params, _, report = pretrained.load_pretrained(
        str(REAL / "yamnet_int8.npz"), "yamnet"
    )
    assert not report.missing and not report.unused
    golden = np.load(REAL / "golden.npz")
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(15600) / 16000)
    for name, sound, least in (
        ("sine440", tone, 0.97),
        ("noise", 0.1 * np.random.default_rng(0).normal(size=15600), 0.85),
    ):
        logits, ends = jax.jit(backbone.apply)(params, sound.astype(np.float32)[None])
        seen, loud = (
            np.asarray(ends["spectra"])[0, :, :, 0, 0],
            golden[f"{name}.logmel"].max(axis=1),
        )
        np.testing.assert_allclose(seen.max(axis=1), loud, atol=0.05)
        heard = np.asarray(backbones.features(backbone, params, sound.astype(np.float32)[None]))[0]
        assert np.corrcoef(heard, golden[f"{name}.embedding"][0])[0, 1] > least
        best = set(np.argsort(golden[f"{name}.scores"][0])[-5:])
        assert int(np.argmax(np.asarray(logits)[0])) in best


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that knows some words of the toybox's captions."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {
        word: i
        for i, word in enumerate(
            ["[PAD]", "[UNK]", "the", "and", "object", "drops", "bounces", "spins", "a", "in"]
        )
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    made.save(str(path))
    return path


def run(file: str, workdir: Path, *more: str) -> dict:
    assert entry.main(["main", f"--config=experiments/{file}", f"--workdir={workdir}", *more]) == 0
    return json.loads((workdir / "results.json").read_text())


def test_a_model_learns_from_sound_and_words_that_others_heard_and_read(
    tmp_path: Path, tokenizer: Path
) -> None:
    for name, arg, more in (
        ("audio_features", "sound", ["--config.model=yamnet_tiny"]),
        ("text_features", "words", ["--config.model=bert_tiny", f"--config.tokenizer={tokenizer}"]),
    ):
        found = run(
            f"extract_features.py:{arg}",
            tmp_path / f"job_{name}",
            "--config.source=toybox:tiny",
            "--config.weights=random",
            f"--config.out_dir={tmp_path / name}",
            *more,
        )
        assert (
            found["extract_features"]["train"]["num_clips"]
            == found["extract_features"]["train"]["computed"]
            > 0
        )
        assert (
            found["extract_features"]["width"] == {"audio_features": 16, "text_features": 32}[name]
        )
    both = DataSpec(
        modalities=("audio_features", "text_features"),
        image_size=32,
        clip_seconds=1.0,
        audio_features=FeatureSpec(str(tmp_path / "audio_features")),
        text_features=FeatureSpec(str(tmp_path / "text_features")),
    )
    record = sources.open_source("toybox:tiny", "train", "~/.cache/particlejax")[0]
    clip = clips.load(record, both, clips.CENTER_VIEW)
    assert not len(clip.frames) and set(clip.features) == {"audio_features", "text_features"}
    # of what the network hears at once, each 0.48 s; the last goes from 1.92 past the end
    length = 3600 / 16000
    middle = (1.92 + length - 1.0) / 2
    np.testing.assert_allclose(
        clip.features["audio_features"].place[:, 0],
        np.array([0.96 + length / 2]) - middle,
        atol=1e-3,
    )
    assert clip.features["text_features"].payload.shape == (1, 32)
    found = run(
        "finetune_features.py:tiny",
        tmp_path / "run",
        "--config.data.modalities=('audio_features','text_features')",
        f"--config.data.audio_features.folder={tmp_path / 'audio_features'}",
        f"--config.data.text_features.folder={tmp_path / 'text_features'}",
        "--config.data.clip_seconds=2.0",
    )
    assert 0 <= found["finetune"]["val"]["top1"] <= 1


def test_a_clip_without_sound_has_none_and_is_not_bad() -> None:
    sampling = {"samples": 3600, "rate": 16000, "seconds": 0.225, "stride": 0.225}
    begins = feature_reader.subclip_starts(1.0, 0.225, 0.225)
    none = job._sound_inputs(None, begins, sampling)
    assert none.data.shape == (0, 3600)
    # the track ends within the second sub-clip
    some = job._sound_inputs(np.ones(5000, np.float32), begins, sampling)
    assert some.data.sum(axis=1).tolist() == [3600, 1400]
    what = feature_reader.FeatureSet(
        "", {}, sampling | {"cells": [1, 1, 1]}, (0.0,) * 4, (1.0,) * 4
    )
    kept = feature_reader.ClipFeatures(
        np.zeros((0, 6), np.float32), np.zeros((0, 4), np.float32), what
    )
    assert kept.length > 0 and not len(kept.slice_time(0.0, 1.0).segment)
