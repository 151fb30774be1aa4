# SPDX-License-Identifier: Apache-2.0
"""Mapping from our module paths to the parameter names and layouts of the library `transformers`.

A template's `{}` is the layer of a stack; brackets give what the name does not: `[1/3]` the second
of three fused arrays, `[2d]` an image convolution, `[1, 1]` leading axes of length one.
"""

import re
from collections.abc import Mapping
from typing import Any

from particlejax.models.zoo.convert.layouts import (
    CONV,
    DENSE,
    IMAGE,
    SAME,
    Entry,
    Grid,
    Layout,
    Names,
    Rules,
    leading_axes,
    merge_heads,
    split_heads,
)

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "gain": "weight",
    "embedding": "weight",
    "bias": "bias",
}

# Names within a block, by five conventions.
_HF4: Rules = (
    (r"attention_norm", "layernorm_before"),
    (r"mlp_norm", "layernorm_after"),
    (r"attention/(query|key|value)", r"attention.attention.\1"),
    (r"attention/out", "attention.output.dense"),
    (r"mlp/up", "intermediate.dense"),
    (r"mlp/down", "output.dense"),
)
_HF5: Rules = (
    (r"attention_norm", "layernorm_before"),
    (r"mlp_norm", "layernorm_after"),
    (r"attention/(q|k|v|o)\w+", r"attention.\1_proj"),
    (r"mlp/up", "mlp.fc1"),
    (r"mlp/down", "mlp.fc2"),
)
_CLIP: Rules = (
    (r"attention_norm", "layer_norm1"),
    (r"mlp_norm", "layer_norm2"),
    (r"attention/(q|k|v)\w+", r"self_attn.\1_proj"),
    (r"attention/out", "self_attn.out_proj"),
    (r"mlp/up", "mlp.fc1"),
    (r"mlp/down", "mlp.fc2"),
)
_JEPA: Rules = (
    (r"attention_norm", "norm1"),
    (r"mlp_norm", "norm2"),
    (r"attention/(query|key|value)", r"attention.\1"),
    (r"attention/out", "attention.proj"),
    (r"mlp/up", "mlp.fc1"),
    (r"mlp/down", "mlp.fc2"),
)
_BERT: Rules = (
    (r"attention/(query|key|value)", r"attention.self.\1"),
    (r"attention/out", "attention.output.dense"),
    (r"attention_norm", "attention.output.LayerNorm"),
    (r"mlp/up", "intermediate.dense"),
    (r"mlp/down", "output.dense"),
    (r"mlp_norm", "output.LayerNorm"),
)
_FUSED: Rules = tuple(
    (f"{path}attention/{name}", f"{reference_name}attention.attention.qkv[{i}/3]")
    for path, reference_name in (("", ""), ("time_", "temporal_"))
    for i, name in enumerate(("query", "key", "value"))
)
_DIVIDED: Rules = (
    *_FUSED,
    *_HF4,
    ("time_norm", "temporal_layernorm"),
    ("time_project", "temporal_dense"),
    ("time_attention/out", "temporal_attention.output.dense"),
)


def _blocks(path: str, reference_name: str, inner: Rules) -> Rules:
    return tuple((f"{path}/blocks/{a}", f"{reference_name}.{b}") for a, b in inner)


def _with_prefix(path: str, reference_name: str, rules: Rules) -> Rules:
    """The rules of a part, given our names and theirs."""
    return tuple((path + a, reference_name + b) for a, b in rules)


_PATCHES = "embeddings.patch_embeddings.projection"
_HEAD: Rules = (("head", "classifier"),)
_MAE: Rules = (
    ("patches", f"videomae.{_PATCHES}"),
    *_blocks("encoder", "videomae.encoder.layer.{}", _HF4),
)
_VIVIT: Rules = (
    ("class_token", "embeddings.cls_token[1, 1]"),
    ("positions", "embeddings.position_embeddings[1]"),
    ("norm", "layernorm"),
)
_JEPA_ENCODER: Rules = (
    ("patches", "encoder.embeddings.patch_embeddings.proj"),
    ("norm", "encoder.layernorm"),
    *_blocks("encoder", "encoder.layer.{}", _JEPA),
)
_POOL = "pooler.cross_attention_layer."
_PRISM: Rules = (
    ("patches", "spatial_embeddings.patch_embeddings.projection"),
    ("norm", "layernorm1"),
    ("positions", "spatial_embeddings.position_embeddings[1]"),
    ("time_norm", "layernorm2"),
    ("time_positions", "temporal_embeddings.position_embeddings[1]"),
    *_blocks("encoder", "spatial_layers.{}", _HF5),
    *_blocks("time", "temporal_layers.{}", _HF5),
)
_PRISM_POOL: Rules = (
    (r"pool/(q|k|v|o)\w+", r"head.\1_proj"),
    ("pool/per_dim_scale", "head.per_dim_scale"),
    ("pool_query", "head.pooling_attention_query[1, 1]"),
    ("pool_norm", "head_layernorm"),
)
_TEXT: Rules = (
    ("table", "embeddings.token_embedding"),
    ("positions", "embeddings.position_embedding.weight"),
    ("norm", "final_layer_norm"),
    *_blocks("encoder", "encoder.layers.{}", _CLIP),
)
_IMAGE: Rules = (
    ("patches", "embeddings.patch_embedding[2d]"),
    ("positions", "embeddings.position_embedding.weight"),
    ("norm", "post_layernorm"),
    *_blocks("encoder", "encoder.layers.{}", _CLIP),
)

_RULES: dict[str, Rules] = {
    "videomae": (
        *_MAE,
        *_HEAD,
        ("head_norm", "fc_norm"),
        ("norm", "videomae.layernorm"),  # of files that classify the first token
    ),
    "videomae_pretraining": (
        *_MAE,
        ("norm", "videomae.layernorm"),
        ("to_decoder", "encoder_to_decoder"),
        ("mask_token", "mask_token[1, 1]"),
        ("decoder_norm", "decoder.norm"),
        ("decoder_head", "decoder.head"),
        *_blocks("decoder", "decoder.decoder_layers.{}", _HF4),
    ),
    "vivit": (
        *_with_prefix(
            "", "vivit.", (("patches", _PATCHES), *_VIVIT, *_blocks("encoder", "layers.{}", _HF5))
        ),
        *_HEAD,
    ),
    "timesformer": (
        *_with_prefix(
            "",
            "timesformer.",
            (
                ("patches", _PATCHES + "[2d]"),
                *_VIVIT,
                ("time_positions", "embeddings.time_embeddings[1]"),
                *_blocks("encoder", "encoder.layer.{}", _DIVIDED),
            ),
        ),
        *_HEAD,
    ),
    "vjepa2": (
        *_with_prefix("", "vjepa2.", _JEPA_ENCODER),
        *_HEAD,
        ("pool_query", "pooler.query_tokens[1, 1]"),
        *_blocks("pooler", "pooler.self_attention_layers.{}", _CLIP),
        ("pool_norm", _POOL + "layer_norm1"),
        (r"pool/(q|k|v)\w+", _POOL + r"cross_attn.\1_proj"),
        ("pool_mlp_norm", _POOL + "layer_norm2"),
        ("pool_mlp/up", _POOL + "mlp.fc1"),
        ("pool_mlp/down", _POOL + "mlp.fc2"),
    ),
    "vjepa2_pretraining": (
        *_JEPA_ENCODER,
        ("to_predictor", "predictor.embeddings.predictor_embeddings"),
        ("mask_tokens", "predictor.embeddings.mask_tokens[:, 1, 1]"),
        ("predictor_norm", "predictor.layernorm"),
        ("predictor_head", "predictor.proj"),
        *_blocks("predictor", "predictor.layer.{}", _JEPA),
    ),
    "videoprism": (*_with_prefix("", "vision_model.", _PRISM), *_PRISM_POOL, *_HEAD),
    "videoprism_text": (
        *_with_prefix("video/", "video_model.vision_model.", _PRISM),
        *_with_prefix("video/", "video_model.", _PRISM_POOL),
        *_blocks("video/auxiliary", "video_model.auxiliary_layers.{}", _HF5),
        ("table", "text_model.embeddings.token_embedding"),
        ("end_token", "text_model.embeddings.cls_emb[1, 1]"),
        ("text_norm", "text_model.layernorm"),
        *_blocks("text", "text_model.layers.{}", _HF5),
    ),
    "bert": (
        ("table", "embeddings.word_embeddings"),
        ("kinds", "embeddings.token_type_embeddings.weight"),
        ("positions", "embeddings.position_embeddings.weight"),
        ("embed_norm", "embeddings.LayerNorm"),
        ("pooler", "pooler.dense"),
        *_blocks("encoder", "encoder.layer.{}", _BERT),
    ),
    "clip": (
        *_with_prefix("text/", "text_model.", _TEXT),
        ("text/project", "text_projection"),
        *_with_prefix("image/", "vision_model.", _IMAGE),
        ("image/project", "visual_projection"),
        ("image/class_token", "vision_model.embeddings.class_embedding"),
        ("logit_scale", "logit_scale"),
        ("image/embed_norm", "vision_model.pre_layrnorm"),
    ),  # sic
    "siglip": (
        *_with_prefix("text/", "text_model.", (*_TEXT, ("project", "head"))),
        ("logit_(scale|bias)", r"logit_\1[1]"),
        *_with_prefix(
            "image/",
            "vision_model.",
            (
                *_IMAGE,
                ("pool_query", "head.probe[1, 1]"),
                ("pool_norm", "head.layernorm"),
                ("pool_mlp/up", "head.mlp.fc1"),
                ("pool_mlp/down", "head.mlp.fc2"),
                ("pool/out", "head.attention.out_proj"),
                *(
                    (f"pool/{n}", f"head.attention.in_proj_[{i}/3]")
                    for i, n in enumerate(("query", "key", "value"))
                ),
            ),
        ),
    ),
    "ast": (
        *_with_prefix(
            "",
            "audio_spectrogram_transformer.",
            (
                ("patches", _PATCHES + "[2d]"),
                *_VIVIT,
                ("distillation_token", "embeddings.distillation_token[1, 1]"),
                *_blocks("encoder", "layers.{}", _HF5),
            ),
        ),
        ("head_norm", "classifier.layernorm"),
        ("head", "classifier.dense"),
    ),
}

# Layer names of files from before transformers 5, as in most published ones.
_BEFORE_5: Rules = (
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.(q|k|v)\w+\.", r"attention.\1_proj."),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)
_GAMMA: Rules = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
_QV: Rules = (
    (r"attention\.q_bias$", "attention.query.bias"),
    (r"attention\.v_bias$", "attention.value.bias"),
)


def _encoder_only(base: str) -> tuple[Rules, ...]:
    """Names of files with the encoder alone, and of those with another base (image ViT)."""
    return ((("^", f"{base}."),), ((r"^vit\.", f"{base}."),))


def _encoder_only_or(rules: Rules, base: str) -> tuple[Rules, ...]:
    """Names of files with these rules, with the encoder alone, and with both."""
    return (rules, *_encoder_only(base), *(rules + bare for bare in _encoder_only(base)))


_DIALECTS: dict[str, tuple[Rules, ...]] = {
    "videomae": _encoder_only_or(_QV, "videomae"),
    "videomae_pretraining": _encoder_only_or(_QV, "videomae"),
    "vivit": _encoder_only_or(_BEFORE_5, "vivit"),
    "timesformer": _encoder_only("timesformer"),
    "vjepa2": _encoder_only("vjepa2"),
    "videoprism": _encoder_only("vision_model"),
    "bert": (_GAMMA,),
    "ast": _encoder_only_or(_BEFORE_5, "audio_spectrogram_transformer"),
}
KINDS = tuple(_RULES)


def names_of(kind: str, flat: Mapping[str, Any], grids: Mapping[str, Grid]) -> Names:
    """The names of a kind of KINDS with these parameter shapes by path; `grids` of its position
    tables.
    """
    entries = tuple(
        entry
        for path, leaf in flat.items()
        for entry in _entries(kind, path, leaf.shape, grids.get(path))
    )
    return Names(entries, (), _DIALECTS.get(kind, ()))


def _entries(kind: str, path: str, shape: tuple[int, ...], grid: Grid | None) -> list[Entry]:
    """One name per layer of a stack, else one."""
    module, _, leaf = path.rpartition("/")
    template, annotation = _reference_name(kind, module if leaf in _LEAVES else path)
    if leaf in _LEAVES:
        template += _LEAVES[leaf] if template.endswith("_") else f".{_LEAVES[leaf]}"
    stacked = "/blocks/" in path
    layout = _layout(path, shape[1:] if stacked else shape, annotation)
    share = tuple(map(int, annotation.split("/"))) if "/" in annotation else (0, 1)
    layers = range(shape[0]) if stacked else [None]
    return [Entry(path, template.format(i), layout, i, share, grid) for i in layers]


def _reference_name(kind: str, path: str) -> tuple[str, str]:
    """The name, and the content of its brackets."""
    template = next(
        match.expand(replacement)
        for pattern, replacement in _RULES[kind]
        if (match := re.fullmatch(pattern, path))
    )
    name, _, annotation = template.partition("[")
    return name, annotation.removesuffix("]")


def _layout(path: str, shape: tuple[int, ...], annotation: str) -> Layout:
    module, _, leaf = path.rpartition("/")
    if annotation == ":, 1, 1":
        return Layout(lambda a: a.reshape(a.shape[0], a.shape[-1]), lambda a: a[:, None, None])
    if leaf in ("kernel", "bias") and module.endswith(("/query", "/key", "/value")):
        return split_heads(shape)
    if leaf == "kernel" and len(shape) == 3:
        return merge_heads(shape)
    if leaf == "kernel":
        return DENSE if len(shape) == 2 else IMAGE if annotation == "2d" else CONV
    return leading_axes(annotation.count("1")) if annotation in ("1", "1, 1") else SAME
