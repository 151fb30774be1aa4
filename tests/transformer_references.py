# SPDX-License-Identifier: Apache-2.0
"""The references of Transformers: those of `transformers`, small, with random weights, and what
they are asked.

    pip install torch==2.13.0 transformers==5.23.0

`make_fixtures` writes what they answer; the live tests and `parity` ask them again. Only
`references`, `published` and what they return need torch.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

VIDEO = {"image_size": 16, "num_frames": 4, "num_labels": 5}
WIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
END = 39  # the token that ends a text of the tiny CLIP
Inputs = tuple[np.ndarray, ...]


class Reference(NamedTuple):
    """A network (torch, eval) and answer(our inputs) -> arrays by name: `answer` is the first
    output of ours, others its ends.
    """

    net: Any
    answer: Callable[..., dict[str, Any]]


def inputs(
    examples: tuple[tuple[tuple[int, ...], str], ...], kind: str, rows: int = 2, end: int = END
) -> Inputs:
    """Two examples for a network that takes these: noise in [-1, 1], texts, masks of padding,
    indices of cuboids.

    Of raw random bits, whose stream numpy promises to keep.
    """
    found: list[np.ndarray] = []
    for i, (shape, dtype) in enumerate(examples):
        bits = (np.random.PCG64(i + 1).random_raw(rows * int(np.prod(shape))) >> 56).reshape(
            rows, *shape
        )
        found.append(
            (bits.astype(np.float32) / 127.5 - 1)
            if dtype == "float32"
            else (bits % 38).astype(np.int32)
        )
    if kind.endswith("_pretraining"):  # every row has its own share of visible cuboids
        visible, hidden = (found[1].shape[1], found[2].shape[1])
        order = np.argsort(
            np.random.PCG64(9).random_raw(rows * (visible + hidden)).reshape(rows, -1), axis=1
        )
        found[1:] = [
            np.sort(part, axis=1).astype(np.int32)
            for part in (order[:, :visible], order[:, visible:])
        ]
    elif kind in ("bert", "videoprism_text"):
        found[-1] = (
            np.arange(found[-1].shape[1]) < found[-1].shape[1] - 2 * np.arange(rows)[:, None]
        ).astype(np.int32)
    elif kind == "clip":
        for row, ids in enumerate(found[1]):
            ids[-1 - row :] = end
    return tuple(found)


def references() -> dict[str, Reference]:
    """One for each tiny Transformer of `models/variants.py`, by its name."""
    import torch

    torch.manual_seed(0)
    made = {name: Reference(net(), answer) for name, (net, answer) in _tiny().items()}
    for reference in made.values():
        randomise(reference.net)
    return made


def weights(shapes: Mapping[str, tuple[int, ...]], gain: bool) -> dict[str, np.ndarray]:
    """Random parameters by name, float32: norms near one (`gain`: near zero), attention neither
    flat nor hard.

    Of raw bits and exact steps, so that they are the same everywhere and fixtures need only hold
    names and shapes.
    """
    return {name: np.asarray(_drawn(name, tuple(shape), gain)) for name, shape in shapes.items()}


def _drawn(name: str, shape: tuple[int, ...], gain: bool) -> np.ndarray:
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(max(1, int(np.prod(shape)))) >> 40
    draw = (bits.astype(np.float32) / np.float32(2**23) - 1).reshape(shape)  # in [-1, 1)
    if len(shape) == 1 and name.endswith("weight"):
        return np.float32(0.25) * draw + np.float32(not gain)
    if (
        len(shape) in (2, 4, 5)
        and "embedding" not in name.removesuffix("projection.weight")
        and "token" not in name
    ):
        return np.float32((6 / np.prod(shape[1:])) ** 0.5) * draw
    return np.float32(0.5) * draw


def answer(kind: str) -> Callable[..., dict[str, Any]]:
    """How references of a kind are asked."""
    return _tiny()[f"{kind}_tiny"][1]


def randomise(net: Any) -> None:
    """Gives a reference network the `weights` of its names and shapes."""
    import torch

    drawn = weights(
        {name: tuple(value.shape) for name, value in net.named_parameters()},
        has_gain(type(net).__name__),
    )
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.copy_(torch.from_numpy(drawn[name]))
    net.eval()


def has_gain(name: str) -> bool:
    """Whether an architecture's norms scale by one plus their weight."""
    return name.lower().startswith("videoprism")


def ask(reference: Reference, given: Inputs) -> dict[str, np.ndarray]:
    """What it answers, by name."""
    import torch

    with torch.no_grad():
        said = reference.answer(
            reference.net, *(torch.from_numpy(np.ascontiguousarray(each)) for each in given)
        )
    return {name: np.asarray(value) for name, value in said.items()}


def state(net: Any) -> dict[str, np.ndarray]:
    """Its parameters by name; constants that it saves among them, such as tables of sines, are
    not.
    """
    return {
        name: value.detach().numpy()
        for name, value in net.named_parameters()
        if not idle(net, name)
    }


def _tiny() -> dict[str, tuple[Callable[[], Any], Callable[..., dict[str, Any]]]]:
    import transformers as hf

    tubes, patch = (
        {**WIDE, **VIDEO, "patch_size": 8, "tubelet_size": 2},
        {"image_size": 16, "patch_size": 8},
    )
    narrow = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    jepa = {
        **WIDE,
        "crop_size": 16,
        "frames_per_clip": 4,
        "patch_size": 8,
        "mlp_ratio": 2.0,
        "num_labels": 5,
        "num_pooler_layers": 1,
        "pred_hidden_size": 24,
        "pred_num_hidden_layers": 1,
        "pred_num_attention_heads": 2,
        "pred_mlp_ratio": 2.0,
        "pred_num_mask_tokens": 3,
    }
    prism = {
        **{k: v for k, v in (WIDE | VIDEO).items() if k != "num_hidden_layers"},
        "tubelet_size": [1, 8, 8],
        "num_spatial_layers": 2,
        "num_temporal_layers": 1,
        "num_auxiliary_layers": 1,
    }
    words = {**WIDE, "vocab_size": 40, "max_position_embeddings": 8}
    clip = {**words, "eos_token_id": END, "bos_token_id": 38}
    return {
        "videomae_tiny": (
            lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**tubes)),
            _video,
        ),
        "videomae_pretraining_tiny": (
            lambda: hf.VideoMAEForPreTraining(
                hf.VideoMAEConfig(**tubes, **narrow, use_mean_pooling=False)
            ),
            _masked,
        ),
        "vivit_tiny": (
            lambda: hf.VivitForVideoClassification(
                hf.VivitConfig(**WIDE, **VIDEO, tubelet_size=[2, 8, 8])
            ),
            _video,
        ),
        "timesformer_tiny": (
            lambda: hf.TimesformerForVideoClassification(
                hf.TimesformerConfig(**WIDE, **VIDEO, patch_size=8)
            ),
            _video,
        ),
        "vjepa2_tiny": (lambda: hf.VJEPA2ForVideoClassification(hf.VJEPA2Config(**jepa)), _jepa),
        "vjepa2_pretraining_tiny": (lambda: hf.VJEPA2Model(hf.VJEPA2Config(**jepa)), _predicted),
        "videoprism_tiny": (
            lambda: hf.VideoPrismForVideoClassification(hf.VideoPrismVisionConfig(**prism)),
            _video,
        ),
        "videoprism_text_tiny": (
            lambda: hf.VideoPrismClipModel(
                hf.VideoPrismConfig(text_config=words, vision_config=prism)
            ),
            _video_text,
        ),
        "ast_tiny": (
            lambda: hf.ASTForAudioClassification(
                hf.ASTConfig(
                    **WIDE,
                    patch_size=8,
                    frequency_stride=5,
                    time_stride=5,
                    max_length=24,
                    num_mel_bins=16,
                    num_labels=5,
                )
            ),
            _sound,
        ),
        "bert_tiny": (
            lambda: hf.BertModel(hf.BertConfig(**words | {"max_position_embeddings": 12})),
            _sentence,
        ),
        "clip_tiny": (
            lambda: hf.CLIPModel(
                hf.CLIPConfig(text_config=clip, vision_config={**WIDE, **patch}, projection_dim=16)
            ),
            _image_text,
        ),
        "siglip_tiny": (
            lambda: hf.SiglipModel(
                hf.SiglipConfig(text_config=words, vision_config={**WIDE, **patch})
            ),
            _image_text,
        ),
    }


def odd() -> dict[str, Callable[[], Any]]:
    """Networks of sizes that nobody published, with class names, by our kinds."""
    import transformers as hf

    names = ["walk", "run, fast", "jump", "sit", "wave", "clap", "fall"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    wide = {
        "hidden_size": 36,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 50,
    }
    clip = {"image_size": 24, "num_frames": 6, **labels}
    tubes = {"patch_size": 6, "tubelet_size": 3}
    jepa = {"crop_size": 24, "frames_per_clip": 6, "mlp_ratio": 2.0, "num_pooler_layers": 1}
    small = {
        "pred_hidden_size": 12,
        "pred_num_hidden_layers": 1,
        "pred_num_attention_heads": 1,
        "pred_num_mask_tokens": 2,
    }
    return {
        "videomae": lambda: hf.VideoMAEForVideoClassification(
            hf.VideoMAEConfig(**wide | {"num_hidden_layers": 3}, **clip, **tubes, hidden_act="relu")
        ),
        "vivit": lambda: hf.VivitForVideoClassification(
            hf.VivitConfig(**wide, **clip, tubelet_size=[3, 6, 6])
        ),
        "timesformer": lambda: hf.TimesformerForVideoClassification(
            hf.TimesformerConfig(**wide, **clip, patch_size=6)
        ),
        "vjepa2": lambda: hf.VJEPA2ForVideoClassification(
            hf.VJEPA2Config(**wide, **jepa, **tubes, **small, **labels)
        ),
    }


def _channels(video: Any) -> Any:
    """Channels where torch has them."""
    return video.movedim(-1, -3)


def _video(net: Any, video: Any) -> dict[str, Any]:
    # VideoPrism's have an axis of length one
    return {"answer": net(_channels(video)).logits.reshape(len(video), -1)}


def _jepa(net: Any, video: Any) -> dict[str, Any]:
    return {
        "answer": net(_channels(video)).logits,
        "last": net.vjepa2(_channels(video), skip_predictor=True).last_hidden_state,
    }


def _masked(net: Any, video: Any, visible: Any, hidden: Any) -> dict[str, Any]:
    import torch

    mask = torch.ones(len(video), visible.shape[1] + hidden.shape[1], dtype=bool).scatter(
        1, visible.long(), False
    )
    said = net(_channels(video), bool_masked_pos=mask)
    return {"answer": said.logits, "loss": said.loss}


def _predicted(net: Any, video: Any, visible: Any, hidden: Any) -> dict[str, Any]:
    said = net(_channels(video), context_mask=[visible.long()], target_mask=[hidden.long()])
    return {"answer": said.predictor_output.last_hidden_state, "last": said.last_hidden_state}


def _video_text(net: Any, video: Any, ids: Any, mask: Any) -> dict[str, Any]:
    said = net(_channels(video), ids.long(), mask.long())
    return {
        "answer": said.video_embeds @ said.text_embeds.T,
        "video": said.video_embeds,
        "text": said.text_embeds,
    }


def _sound(net: Any, spectrogram: Any) -> dict[str, Any]:
    return {"answer": net(spectrogram).logits}


def _sentence(net: Any, ids: Any, mask: Any) -> dict[str, Any]:
    import torch

    said = net(ids.long(), attention_mask=mask.long())
    weight = mask[..., None].float()
    mean = (said.last_hidden_state * weight).sum(1) / weight.sum(1)
    return {
        "answer": torch.nn.functional.normalize(mean),
        "last": said.last_hidden_state,
        "pooled": said.pooler_output,
    }


def _image_text(net: Any, image: Any, ids: Any) -> dict[str, Any]:
    said = net(pixel_values=_channels(image), input_ids=ids.long())
    return {"answer": said.logits_per_image, "image": said.image_embeds, "text": said.text_embeds}


def idle(net: Any, name: str) -> bool:
    """Whether a parameter is one that the network saves and does not use: V-JEPA 2's predictor,
    where it classifies.
    """
    return hasattr(net, "vjepa2") and ".predictor." in name


def published(hf: Any) -> dict[str, Callable[[], Any]]:
    """The published sizes, by our names."""
    mae, clip = {"num_labels": 400}, {"text_config": {}, "projection_dim": 512}
    jepa = {
        "crop_size": 256,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    minilm = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    return {
        "videomae_base": lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**mae)),
        "videomae_large": lambda: hf.VideoMAEForVideoClassification(
            hf.VideoMAEConfig(
                **mae,
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
            )
        ),
        "videomae_pretraining_base": lambda: hf.VideoMAEForPreTraining(
            hf.VideoMAEConfig(use_mean_pooling=False)
        ),
        "vivit_base": lambda: hf.VivitForVideoClassification(hf.VivitConfig(**mae)),
        "timesformer_base": lambda: hf.TimesformerForVideoClassification(
            hf.TimesformerConfig(**mae)
        ),
        "vjepa2_large": lambda: hf.VJEPA2ForVideoClassification(
            hf.VJEPA2Config(**jepa, frames_per_clip=16, num_labels=174)
        ),
        "vjepa2_pretraining_large": lambda: hf.VJEPA2Model(hf.VJEPA2Config(**jepa)),
        "videoprism_base": lambda: hf.VideoPrismForVideoClassification(
            hf.VideoPrismVisionConfig(**mae)
        ),
        "videoprism_text_base": lambda: hf.VideoPrismClipModel(hf.VideoPrismConfig()),
        "ast_base": lambda: hf.ASTForAudioClassification(hf.ASTConfig(num_labels=527)),
        "bert_base": lambda: hf.BertModel(hf.BertConfig()),
        "minilm": lambda: hf.BertModel(hf.BertConfig(**minilm)),
        "clip_base_32": lambda: hf.CLIPModel(
            hf.CLIPConfig(**clip, vision_config={"patch_size": 32})
        ),
        "clip_base_16": lambda: hf.CLIPModel(
            hf.CLIPConfig(**clip, vision_config={"patch_size": 16})
        ),
        "siglip_base_16": lambda: hf.SiglipModel(hf.SiglipConfig()),
    }
