# SPDX-License-Identifier: Apache-2.0
"""Registry of published networks, used by import, prediction and feature extraction."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.linen as nn

from particlejax.config import plugins
from particlejax.core.typing import UserError
from particlejax.models.zoo.c3d_i3d import C3D, I3D
from particlejax.models.zoo.resnet3d import X3D, ResNet
from particlejax.models.zoo.text_image_encoders import (
    AST,
    Bert,
    ImageText,
    ImageTower,
    TextTower,
    VideoText,
)
from particlejax.models.zoo.video_transformers import (
    VJEPA2,
    Inputs,
    TimeSformer,
    VideoMAE,
    VideoMAEPretraining,
    VideoPrism,
    ViViT,
    VJEPA2Pretraining,
)
from particlejax.models.zoo.vit_blocks import BlockStyle, StackSize
from particlejax.models.zoo.yamnet import YAMNet

Describe = TypeVar("Describe", bound=Callable[[], "BackboneSpec"])
Channels = float | tuple[float, float, float]
# of networks that agree in all else: a clip's size, the classes, how tokens are pooled
_FREE_FIELDS = (
    "parent name dtype style classes frames rows columns num_frames num_bands mean_pool "
    "end_token_id"
).split()


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """A network, its clip size and its pixel normalization."""

    kind: str  # of names in `adapt.names`
    net: nn.Module
    frames: int
    size: int  # rows and columns
    default_endpoint: str  # default endpoint of `features`
    mean: Channels = 0.45  # of pixels in [0, 1]
    std: Channels = 0.225
    # shapes and dtypes of one example's inputs, if it takes more than a clip
    inputs: Inputs = ()
    name: str = ""  # as `VARIANTS` has it, or its kind where the sizes are others
    # of the classes in order, where the weights name them
    class_names: tuple[str, ...] = ()
    short_side: int = 0  # pixels to which frames are scaled before the center crop; 0: size

    @property
    def examples(self) -> Inputs:
        """Shapes and dtypes of one example's inputs."""
        return self.inputs or (((self.frames, self.size, self.size, 3), "float32"),)

    @property
    def video(self) -> bool:
        """Whether it takes only clips."""
        return [len(shape) for shape, _ in self.examples] == [4]

    @property
    def sound(self) -> bool:
        """Whether it takes only audio samples."""
        return [(len(shape), dtype) for shape, dtype in self.examples] == [(1, "float32")]

    @property
    def text(self) -> bool:
        """Whether it takes only token ids and their mask."""
        return [(len(shape), dtype) for shape, dtype in self.examples] == [(1, "int32")] * 2


def with_size(spec: BackboneSpec, frames: int, size: int) -> BackboneSpec:
    """The same spec for other example sizes; 0: unchanged. Raises UserError if it has none."""
    if not spec.inputs:
        return dataclasses.replace(spec, frames=frames or spec.frames, size=size or spec.size)
    if not hasattr(spec.net, "with_size"):
        raise UserError(
            f"a {spec.kind} takes neither frames nor sizes: leave config.num_frames and "
            "config.image_size at "
            "0."
        )
    net = spec.net.with_size(frames, size)
    resized = transformer_spec(spec.kind, net, spec.mean, spec.std)
    return dataclasses.replace(
        resized,
        name=spec.name,
        class_names=spec.class_names,
        short_side=round(spec.short_side * resized.size / spec.size) if spec.short_side else 0,
    )


def transformer_spec(
    kind: str,
    net: Any,
    mean: Channels = (0.485, 0.456, 0.406),
    std: Channels = (0.229, 0.224, 0.225),
) -> BackboneSpec:
    """The spec of a Transformer; normalization defaults to ImageNet's mean and deviation."""
    return BackboneSpec(
        kind, net, getattr(net, "frames", 0), getattr(net, "rows", 0), "last", mean, std, net.inputs
    )


# Published widths and depths; the tiny ones are for tests and smoke runs.
_CNNS: dict[str, BackboneSpec] = {
    "c3d": BackboneSpec("c3d", C3D(487), 16, 112, "fc6"),  # 487: Sports-1M
    "i3d": BackboneSpec("i3d", I3D(400), 64, 224, "Mixed_5c", 0.5, 0.5),
    "i3d_r50": BackboneSpec("resnet", ResNet(400), 8, 224, "stage4"),
    "x3d_xs": BackboneSpec("x3d", X3D(400, window=(4, 5, 5)), 4, 160, "stage4"),
    "x3d_s": BackboneSpec("x3d", X3D(400, window=(13, 5, 5)), 13, 160, "stage4"),
    "x3d_m": BackboneSpec("x3d", X3D(400), 16, 224, "stage4"),
    "x3d_l": BackboneSpec(
        "x3d", X3D(400, depths=(5, 10, 25, 15), window=(16, 10, 10)), 16, 312, "stage4"
    ),
    "c3d_tiny": BackboneSpec(
        "c3d", C3D(10, ((4,), (4,), (4, 4), (8, 8), (8, 8)), 16), 16, 32, "fc6"
    ),
    "i3d_tiny": BackboneSpec("i3d", I3D(400, width_divisor=16), 16, 32, "Mixed_5c", 0.5, 0.5),
    "i3d_r50_tiny": BackboneSpec("resnet", ResNet(10, 2, window=(2, 1, 1)), 4, 32, "stage4"),
    "x3d_tiny": BackboneSpec(
        "x3d",
        X3D(10, (1, 1, 3, 2), (8, 8, 16, 32), (18, 18, 36, 72), (8, 8, 8, 8), 32, (4, 1, 1)),
        4,
        32,
        "stage4",
    ),
}

_TINY, _TINY_DECODER = StackSize(32, 2, 4, 64), StackSize(16, 1, 2, 32)  # of tiny models
_CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_TEXT, _SIGLIP = StackSize(512, 12, 8, 2048), StackSize(768, 12, 12, 3072)
_SIGLIP_STYLE = BlockStyle(1e-6, "gelu_tanh")


def _tiny(
    network: type[nn.Module], patch: tuple[int, int, int] = (2, 8, 8), **overrides: Any
) -> nn.Module:
    return network(
        **{
            "classes": 5,
            "frames": 4,
            "rows": 16,
            "columns": 16,
            "patch": patch,
            "size": _TINY,
            **overrides,
        }
    )


_TRANSFORMERS: dict[str, BackboneSpec] = {
    "videomae_base": transformer_spec("videomae", VideoMAE(400)),
    "videomae_large": transformer_spec(
        "videomae", VideoMAE(400, size=StackSize(1024, 24, 16, 4096))
    ),
    "videomae_pretraining_base": transformer_spec("videomae_pretraining", VideoMAEPretraining()),
    "vivit_base": transformer_spec("vivit", ViViT(400), 0.5, 0.5),
    "timesformer_base": transformer_spec("timesformer", TimeSformer(400), 0.45, 0.225),
    "vjepa2_large": transformer_spec("vjepa2", VJEPA2(174, 16)),  # 174: Something-Something v2
    "vjepa2_pretraining_large": transformer_spec("vjepa2_pretraining", VJEPA2Pretraining()),
    "videoprism_base": transformer_spec("videoprism", VideoPrism(400), 0.0, 1.0),
    "videoprism_text_base": transformer_spec(
        "videoprism_text", VideoText(VideoPrism(0, auxiliary=2)), 0.0, 1.0
    ),
    "ast_base": transformer_spec("ast", AST()),
    "bert_base": transformer_spec("bert", Bert()),
    "minilm": transformer_spec("bert", Bert(size=StackSize(384, 6, 12, 1536))),
    "clip_base_32": transformer_spec("clip", ImageText(ImageTower(), TextTower()), *_CLIP_PIXELS),
    "clip_base_16": transformer_spec(
        "clip", ImageText(ImageTower(patch=16), TextTower()), *_CLIP_PIXELS
    ),
    "siglip_base_16": transformer_spec(
        "siglip",
        ImageText(
            ImageTower(0, patch=16, style=_SIGLIP_STYLE),
            TextTower(768, 32000, 64, -1, True, _SIGLIP, _SIGLIP_STYLE),
            bias=True,
        ),
        0.5,
        0.5,
    ),
    "videomae_tiny": transformer_spec("videomae", _tiny(VideoMAE)),
    "videomae_pretraining_tiny": transformer_spec(
        "videomae_pretraining", _tiny(VideoMAEPretraining, classes=0, decoder_size=_TINY_DECODER)
    ),
    "vivit_tiny": transformer_spec("vivit", _tiny(ViViT), 0.5, 0.5),
    "timesformer_tiny": transformer_spec("timesformer", _tiny(TimeSformer, (1, 8, 8)), 0.45, 0.225),
    "vjepa2_tiny": transformer_spec("vjepa2", _tiny(VJEPA2, pooler_depth=1)),
    "vjepa2_pretraining_tiny": transformer_spec(
        "vjepa2_pretraining",
        _tiny(VJEPA2Pretraining, classes=0, predictor_size=StackSize(24, 1, 2, 48), mask_tokens=3),
    ),
    "videoprism_tiny": transformer_spec(
        "videoprism", _tiny(VideoPrism, (1, 8, 8), time_depth=1), 0.0, 1.0
    ),
    "videoprism_text_tiny": transformer_spec(
        "videoprism_text",
        VideoText(_tiny(VideoPrism, (1, 8, 8), classes=0, time_depth=1, auxiliary=1), 40, 8, _TINY),
        0.0,
        1.0,
    ),
    "ast_tiny": transformer_spec("ast", AST(5, 24, 16, 8, 5, _TINY)),
    "bert_tiny": transformer_spec("bert", Bert(40, 12, 2, _TINY)),
    "clip_tiny": transformer_spec(
        "clip",
        ImageText(ImageTower(16, 16, 16, 8, _TINY), TextTower(16, 40, 8, 39, size=_TINY)),
        *_CLIP_PIXELS,
    ),
    "siglip_tiny": transformer_spec(
        "siglip",
        ImageText(
            ImageTower(0, 16, 16, 8, _TINY, _SIGLIP_STYLE),
            TextTower(32, 40, 8, -1, True, _TINY, _SIGLIP_STYLE),
            bias=True,
        ),
        0.5,
        0.5,
    ),
}
_SOUND: dict[str, BackboneSpec] = {
    name: BackboneSpec("yamnet", net, 0, 0, "last", 0.0, 1.0, net.inputs)
    for name, net in {
        "yamnet": YAMNet(),
        "yamnet_tiny": YAMNet(5, 4, ((8, 2), (16, 2)), 3600),
    }.items()
}
VARIANTS: dict[str, BackboneSpec] = _CNNS | _TRANSFORMERS | _SOUND


def differences(a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """Fields in which two networks differ, with both values; clip sizes and classes are free."""
    if type(a) is not type(b):
        yield "the network", type(a).__name__, type(b).__name__
        return
    for field in dataclasses.fields(a):
        if field.name in _FREE_FIELDS:
            continue
        x, y = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x):
            yield from differences(x, y)
        elif x != y:
            yield field.name, x, y


def register_network(name: str) -> Callable[[Describe], Describe]:
    """Decorator that registers a network: a function without arguments that returns its
    `BackboneSpec`.

    `name` is then valid wherever a published network is named (features, probes, stems,
    predictions). Raises ValueError for a duplicate name.
    """

    def register(describe: Describe) -> Describe:
        plugins.add(VARIANTS, "network", name, describe())
        return describe

    return register
