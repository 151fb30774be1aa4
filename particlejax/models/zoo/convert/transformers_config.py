# SPDX-License-Identifier: Apache-2.0
"""From config.json of the library transformers to a `BackboneSpec`.

Every published architecture of `transformer_names` is recognized, at any width and depth; a setting
that a network does not have is refused. A key that is not there has the library's default.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from particlejax.core.errors import UserError
from particlejax.core.suggest import did_you_mean
from particlejax.models.zoo.convert.config_settings import Keys, Settings, Triple
from particlejax.models.zoo.networks import VARIANTS, BackboneSpec, differences, transformer_spec
from particlejax.models.zoo.text_image_encoders import AST, Bert, ImageText, TextTower, VideoText
from particlejax.models.zoo.vit_blocks import StackSize

IMAGE_VIT = "vit"  # model_type of an image network whose weights become a ViViT's
_OLD_END_TOKEN = 2  # of the first CLIP configs, whose texts end with the highest id
_MAX_LISTED = 4  # differences in an error
_UNNAMED = "LABEL_"  # class names of a config without class names


class Family(NamedTuple):
    """An architecture: its kinds in `networks`, and the network of a config of a kind.

    base: the published variant whose other settings and pixel normalization it has.
    """

    kind: str
    base: str
    build: Callable[[Settings, Any], nn.Module]
    # architecture: (kind, variant) of networks with more than an encoder and its head
    others: Mapping[str, tuple[str, str]] = {}


def _clip_sizes(settings: Settings, frames: int, side: int, patch: Triple) -> dict[str, Any]:
    return {"frames": frames, "rows": side, "columns": side, "patch": patch}


def _square_patch(settings: Settings) -> Triple:
    side = settings.side("patch_size", 16)
    return (settings.get("tubelet_size", 2), side, side)


def _videomae(settings: Settings, net: Any) -> nn.Module:
    settings.require("num_channels", 3)
    sizes = {
        **_clip_sizes(
            settings,
            settings.get("num_frames", 16),
            settings.side("image_size", 224),
            _square_patch(settings),
        ),
        "size": settings.stack(),
        "style": settings.style(
            net.style, "gelu", "qkv_bias" if "qkv_bias" in settings.values else "qv_bias"
        ),
        "mean_pool": settings.get("use_mean_pooling", True, bool),
    }
    if hasattr(net, "decoder_size"):
        sizes["decoder_size"] = settings.checked(
            StackSize(
                settings.get("decoder_hidden_size", 384),
                settings.get("decoder_num_hidden_layers", 4),
                settings.get("decoder_num_attention_heads", 6),
                settings.get("decoder_intermediate_size", 1536),
            )
        )
    return net.clone(**sizes)


def _vivit(settings: Settings, net: Any) -> nn.Module:
    settings.require("num_channels", 3)
    return net.clone(
        **_clip_sizes(
            settings,
            settings.get("num_frames", 32),
            settings.side("image_size", 224),
            settings.triple("tubelet_size", (2, 16, 16)),
        ),
        size=settings.stack(),
        style=settings.style(net.style, "gelu_fast", "qkv_bias"),
    )


def _image_vit(settings: Settings, net: Any) -> nn.Module:
    """A ViViT whose cuboids have the base's frames, for the weights of an image ViT."""
    settings.require("num_channels", 3)
    rows = settings.side("patch_size", 16)
    return net.clone(
        **_clip_sizes(
            settings, net.frames, settings.side("image_size", 224), (net.patch[0], rows, rows)
        ),
        size=settings.stack(),
    )


def _timesformer(settings: Settings, net: Any) -> nn.Module:
    settings.require("num_channels", 3)
    settings.require("attention_type", "divided_space_time")
    side = settings.side("patch_size", 16)
    return net.clone(
        **_clip_sizes(
            settings,
            settings.get("num_frames", 8),
            settings.side("image_size", 224),
            (1, side, side),
        ),
        size=settings.stack(),
        style=settings.style(net.style, "gelu", "qkv_bias"),
    )


def _vjepa2(settings: Settings, net: Any) -> nn.Module:
    settings.require("in_chans", 3)
    size = settings.stack(heads=16, width=1024, depth=24)
    mlp = int(size.width * settings.number("mlp_ratio", 4.0))
    sizes = {
        **_clip_sizes(
            settings,
            settings.get("frames_per_clip", 64),
            settings.side("crop_size", 256),
            _square_patch(settings),
        ),
        "size": dataclasses.replace(size, mlp=mlp),
        "style": settings.style(net.style, "gelu", "qkv_bias"),
    }
    if hasattr(net, "predictor_size"):
        width = settings.get("pred_hidden_size", 384)
        sizes["predictor_size"] = settings.checked(
            StackSize(
                width,
                settings.get("pred_num_hidden_layers", 12),
                settings.get("pred_num_attention_heads", 12),
                int(width * settings.number("pred_mlp_ratio", 4.0)),
            )
        )
        sizes["mask_tokens"] = settings.get("pred_num_mask_tokens", 10)
    else:
        sizes["pooler_depth"] = settings.get("num_pooler_layers", 3)
    return net.clone(**sizes)


def _videoprism(settings: Settings, net: Any) -> nn.Module:
    settings.require("num_channels", 3)
    style = settings.style(net.style, "gelu_python")
    softcap = settings.number("attn_logit_softcapping", 50.0)
    return net.clone(
        **_clip_sizes(
            settings,
            settings.get("num_frames", 16),
            settings.side("image_size", 288),
            settings.triple("tubelet_size", (1, 18, 18)),
        ),
        size=dataclasses.replace(settings.stack(), depth=settings.get("num_spatial_layers", 12)),
        style=dataclasses.replace(style, softcap=softcap),
        time_depth=settings.get("num_temporal_layers", 4),
    )


def _videoprism_text(settings: Settings, net: VideoText) -> nn.Module:
    text, vision = settings.section("text_config"), settings.section("vision_config")
    for part in (text, vision):
        part.require("apply_l2norm", True)
    style = text.style(net.style, "relu")
    softcap = text.number("attn_logit_softcapping", 50.0)
    return net.clone(
        video=_videoprism(vision, net.video).clone(auxiliary=vision.get("num_auxiliary_layers", 2)),
        vocab_size=text.get("vocab_size", 32000),
        max_positions=text.get("max_position_embeddings", 64),
        size=text.stack(),
        style=dataclasses.replace(style, softcap=softcap),
    )


def _bert(settings: Settings, net: Bert) -> nn.Module:
    settings.require("position_embedding_type", "absolute")
    settings.require("is_decoder", False)
    return net.clone(
        vocab_size=settings.get("vocab_size", 30522),
        max_positions=settings.get("max_position_embeddings", 512),
        num_segment_types=settings.get("type_vocab_size", 2),
        size=settings.stack(),
        style=settings.style(net.style, "gelu"),
    )


def _ast(settings: Settings, net: AST) -> nn.Module:
    stride = settings.get("frequency_stride", 10)
    settings.require("time_stride", stride)
    return net.clone(
        num_frames=settings.get("max_length", 1024),
        num_bands=settings.get("num_mel_bins", 128),
        patch=settings.side("patch_size", 16),
        stride=stride,
        size=settings.stack(),
        style=settings.style(net.style, "gelu"),
    )


def _text_tower(
    text: Settings, tower: TextTower, embed_dim: int, mlp: int, heads: int
) -> TextTower:
    vocabulary = text.get("vocab_size", tower.vocab_size)
    end = tower.end_token_id
    if end >= 0:
        end = text.get("eos_token_id", end)
        end = vocabulary - 1 if end == _OLD_END_TOKEN else end
    activation = tower.style.activation.replace("gelu_tanh", "gelu_pytorch_tanh")
    return tower.clone(
        embed_dim=embed_dim,
        vocab_size=vocabulary,
        max_positions=text.get("max_position_embeddings", tower.max_positions),
        end_token_id=end,
        size=text.stack(heads, mlp, tower.size.width),
        style=text.style(tower.style, activation),
    )


def _image_text(settings: Settings, net: ImageText) -> nn.Module:
    text, vision = settings.section("text_config"), settings.section("vision_config")
    vision.require("num_channels", 3)
    vision.require("vision_use_head", True)
    is_clip, side = net.image.embed_dim > 0, vision.side("image_size", 224)
    width = text.get("hidden_size", net.text.size.width)
    embed_dim = (
        settings.get("projection_dim", 512) if is_clip else text.get("projection_size", width)
    )
    activation = "quick_gelu" if is_clip else "gelu_pytorch_tanh"
    return net.clone(
        image=net.image.clone(
            embed_dim=embed_dim if is_clip else 0,
            rows=side,
            columns=side,
            patch=vision.side("patch_size", 32 if is_clip else 16),
            size=vision.stack(),
            style=vision.style(net.image.style, activation),
        ),
        text=_text_tower(text, net.text, embed_dim, net.text.size.mlp, net.text.size.heads),
    )


_FAMILIES: dict[str, Family] = {
    "videomae": Family(
        "videomae",
        "videomae_base",
        _videomae,
        {"VideoMAEForPreTraining": ("videomae_pretraining", "videomae_pretraining_base")},
    ),
    "vivit": Family("vivit", "vivit_base", _vivit),
    "timesformer": Family("timesformer", "timesformer_base", _timesformer),
    "vjepa2": Family(
        "vjepa2",
        "vjepa2_large",
        _vjepa2,
        {"VJEPA2Model": ("vjepa2_pretraining", "vjepa2_pretraining_large")},
    ),
    "videoprism_vision_model": Family("videoprism", "videoprism_base", _videoprism),
    "videoprism": Family("videoprism_text", "videoprism_text_base", _videoprism_text),
    "audio-spectrogram-transformer": Family("ast", "ast_base", _ast),
    "bert": Family("bert", "bert_base", _bert),
    "clip": Family("clip", "clip_base_32", _image_text),
    "siglip": Family("siglip", "siglip_base_16", _image_text),
}
_BY_ARCHITECTURE = {  # how class names begin, the longer ones first
    "VideoMAE": "videomae",
    "Vivit": "vivit",
    "Timesformer": "timesformer",
    "VJEPA2": "vjepa2",
    "VideoPrismClip": "videoprism",
    "VideoPrism": "videoprism_vision_model",
    "AST": "audio-spectrogram-transformer",
    "Bert": "bert",
    "CLIPModel": "clip",
    "SiglipModel": "siglip",
    "ViT": IMAGE_VIT,
}
_OF_IMAGE_VIT = Family("vivit", "vivit_base", _image_vit)


def is_supported(config: Mapping[str, Any]) -> bool:
    """Whether the architecture of a config.json is one of those here."""
    return model_type_of(config) in _FAMILIES


def model_type_of(config: Mapping[str, Any]) -> str:
    """The model_type of a config.json, or else that of its architecture, or ''."""
    if config.get("model_type"):
        return str(config["model_type"])
    for architecture in _architectures(config):
        for prefix, model_type in _BY_ARCHITECTURE.items():
            if architecture.startswith(prefix):
                return model_type
    return ""


def network_of(
    config: Mapping[str, Any], file: str, model: str, keys: Keys, whole: bool = False
) -> BackboneSpec:
    """The network that a config.json describes, with the class names.

    model: a published variant or an architecture that the user named with `keys`; '': the
    architecture of the config, of pretraining weights the encoder alone unless `whole`. Raises
    UserError for an unknown architecture, a setting without support, and for a `model` that the
    config contradicts.
    """
    settings = Settings(file, config)
    family = _family(settings, model, keys)
    kind, base = family.kind, family.base
    for architecture, (other_kind, other_base) in family.others.items():
        named = VARIANTS[model].kind if model in VARIANTS else model
        if named == other_kind or (whole and not model and architecture in _architectures(config)):
            kind, base = other_kind, other_base
    published = VARIANTS[base]
    net = family.build(settings, published.net)
    class_names = class_names_of(settings)
    if class_names and getattr(net, "classes", 0):
        net = net.clone(classes=len(class_names))
    _check_cuboids(settings, net)
    spec = transformer_spec(kind, net, published.mean, published.std)
    variant = VARIANTS.get(model)
    if variant is not None and (found := list(differences(variant.net, net))):
        ours, theirs = (
            ", ".join(f"{field} {values[i]}" for field, *values in found[:_MAX_LISTED])
            for i in (0, 1)
        )
        raise UserError(
            f"{keys.model}={model!r} has {ours} but {file} says {theirs}: {keys.remedy}."
        )
    same = (
        name
        for name, other in VARIANTS.items()
        if other.kind == kind and not any(differences(other.net, net))
    )
    unnamed = class_names and all(name.startswith(_UNNAMED) for name in class_names)
    return dataclasses.replace(
        spec,
        name=(model if variant is not None else "") or next(same, kind),
        class_names=() if unnamed else class_names,
    )


def class_names_of(settings: Settings) -> tuple[str, ...]:
    """The names of `id2label` in order, () if there are none. Raises UserError for other keys than
    0, 1, ...
    """
    listed = settings.values.get("id2label")
    if not listed:
        return ()
    names = (
        {str(key): str(name) for key, name in listed.items()}
        if (isinstance(listed, Mapping))
        else {}
    )
    order = [str(i) for i in range(len(names))]
    if not names or names.keys() != set(order):
        raise settings.error("id2label", "its keys must be 0, 1, ... in the order of the classes")
    return tuple(names[key] for key in order)


def _family(settings: Settings, model: str, keys: Keys) -> Family:
    """The family of a config. Raises UserError for an unknown one, and where the model is of
    another.
    """
    kind = model_type_of(settings.values)
    named = VARIANTS[model].kind if model in VARIANTS else model
    if kind == IMAGE_VIT:
        if named == "vivit":
            return _OF_IMAGE_VIT
        raise UserError(
            f"{settings.file} is of an image ViT, which becomes a video network as a ViViT: set "
            f"{keys.model}=vivit."
        )
    if kind not in _FAMILIES:
        architectures = ", ".join(_architectures(settings.values)) or "no architecture"
        raise UserError(
            f"{settings.file} is of model_type {kind!r} ({architectures}), which is not known: "
            f"{did_you_mean(kind, _FAMILIES)}"
        )
    family = _FAMILIES[kind]
    kinds = {family.kind, *(other for other, _ in family.others.values())}
    if named and named not in kinds:
        raise UserError(
            f"{keys.model}={model!r} is another architecture than that of {settings.file}, {kind}: "
            f"{keys.remedy}."
        )
    return family


def _architectures(config: Mapping[str, Any]) -> list[str]:
    listed = config.get("architectures")
    return [str(name) for name in listed] if isinstance(listed, list) else []


def _check_cuboids(settings: Settings, net: Any) -> None:
    """Raises UserError if clips are no multiple of their cuboids."""
    video = getattr(net, "video", net)
    if isinstance(getattr(video, "patch", None), tuple):
        clip = (video.frames, video.rows, video.columns)
        if any(n % k for n, k in zip(clip, video.patch, strict=True)):
            raise UserError(
                f"{settings.file} says clips of {' x '.join(map(str, clip))}, which are no "
                f"multiple of its patches of {' x '.join(map(str, video.patch))}: fetch it again."
            )
