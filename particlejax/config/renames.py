# SPDX-License-Identifier: Apache-2.0
"""Old names of format 1: config keys, values, objectives, metrics and parameters.

The tables map old names to new ones. They upgrade the config.json, logs and checkpoints of old
runs, and give the new name in errors about old ones. Spec classes have their new names.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

FORMAT = 3  # of config.json; a file without the key `format` has format 1


def _table(text: str) -> dict[str, str]:
    """Parses 'old new, old new' into a dict."""
    return dict(pair.split() for pair in text.split(","))


MODALITIES = _table(
    "series timeseries, features video_features, heard audio_features, told text_features"
)
OBJECTIVES = _table(
    "masked masked_autoencoder, latent jepa, distil feature_distillation,"
    "next_frame future_prediction, order clip_order, speed playback_speed, arrow arrow_of_time,"
    "transform rotation_flip, sync synchronization, contrast contrastive, match text_matching,"
    "align temporal_alignment, words masked_lm, visual_words masked_visual_tokens, trace framewise,"
    "pseudo pseudo_label"
)
JOBS = _table(
    "label_next active_learning, recognise predict, probe_backbone linear_probe,"
    "features extract_features, prototypes fewshot_prototypes, soup model_soup,"
    "prepare prepare_data, bench_peer bench_videomae, bench_data bench_dataloader,"
    "bench_faults bench_fault_tolerance"
)
_FILES = _table(
    "label_next active_learning, recognise predict, probe_backbone linear_probe,"
    "features extract_features, prototypes fewshot_prototypes, soup model_soup,"
    "prepare prepare_data, bench/peer bench/videomae, bench/data bench/dataloader,"
    "bench/faults bench/fault_tolerance, pretrain/one pretrain/single_objective,"
    "pretrain/lips pretrain/lip_sync, pretrain/everything pretrain/all_objectives,"
    "pretrain/mae_base pretrain/videomae_base, pretrain/distil pretrain/feature_distillation"
)
FILES = {f"experiments/{old}.py": f"experiments/{new}.py" for old, new in _FILES.items()}

_MASK = "mask mask_type, keep mask_ratio"
_WORKERS = "threads num_threads, workers num_workers"
_SPLITS = "train train_split, test test_split, rows batch_size, max_bad max_unreadable, penalty l2"
KEYS: dict[str, dict[str, str]] = {
    spec: _table(text)
    for spec, text in {
        "Experiment": "order stage_order, init init_from, evaluate eval, cluster distributed",
        "EvaluateJob": "evaluate eval, cluster distributed",
        "FewshotPrototypesJob": "evaluate eval",
        "ActiveLearningJob": "evaluate eval, active active_learning",
        "ModelSoupJob": "evaluate eval, soup model_soup",
        "RunDataSpec": f"{_WORKERS}, max_bad max_unreadable",
        "LabeledDataSpec": "listed labelled_csv",
        "PrepareDataSpec": "max_bad max_unreadable, time_limit decode_timeout_seconds",
        "AugmentSpec": "crop crop_scale, flip hflip_prob, directed no_flip_classes,"
        "speed speed_range, jitter color_jitter, operations randaug_num_ops,"
        "magnitude randaug_magnitude, erase random_erasing_prob, mixup mixup_alpha,"
        "cutmix cutmix_alpha, gain audio_gain_db, shift audio_shift_seconds,"
        "bands specaugment_num_masks",
        "AudioSpec": "rate sample_rate, window window_seconds, hop hop_seconds, mels num_mels,"
        "low f_min, high f_max, patch patch_size, seconds max_seconds",
        "TextSpec": "length max_length",
        "TimeseriesSpec": "rate sample_rate, window patch_length, seconds max_seconds",
        "FeatureSpec": "scale normalization, seconds max_seconds",
        "DataSpec": "sample frame_sampling, stride frame_stride, fraction train_fraction,"
        "listed labelled_csv, unlabelled unlabelled_fraction, frames num_frames, size image_size,"
        "seconds clip_seconds, decode_side decode_short_side, series timeseries,"
        "features video_features, heard audio_features, told text_features, mean image_mean,"
        "std image_std, still temporal_mean_scale, max_bad max_unreadable,"
        "memory_gib ram_cache_gib, time_limit decode_timeout_seconds, threads num_threads,"
        "workers num_workers",
        "ParticleSpec": "base patch_size, factor level_factor, levels num_levels,"
        "splits split_axes, measure split_criterion, threshold run_threshold",
        "OptimSpec": "rate learning_rate, warmup warmup_ratio, final final_lr_ratio,"
        "clip_norm grad_clip_norm",
        "ScaleSpec": "frames num_frames, size image_size, seconds clip_seconds,"
        "stride frame_stride, levels num_levels, splits split_axes, share weight",
        "ScaleScheduleSpec": "rounds num_cycles, settle final_fraction, short short_cycle_factors",
        "StageSpec": "steps num_steps, epochs num_epochs, rows batch_size,"
        "accumulate grad_accum_steps, init init_from, tune finetune, schedule scale_schedule,"
        "val val_split, val_every val_every_steps, ema ema_decay, select best_metric,"
        "select_mode best_mode, patience early_stopping_patience",
        "MeasureSpec": "rows batch_size",
        "DistributedSpec": "coordinator coordinator_address, processes num_processes,"
        "process process_id, heartbeat heartbeat_timeout_seconds, patience initialization_timeout",
        "CheckpointSpec": "every save_interval_steps, keep max_to_keep",
        "LogSpec": "every every_steps, peak peak_flops, wandb wandb_project",
        "PrepareSpec": "out data_dir, per_shard clips_per_shard, workers num_workers",
        "BenchSpec": "clips num_clips, rows batch_size",
        "SweepSpec": "search num_trials",
        "StemSpec": "network model",
        "ModelSpec": "heads num_heads, near distance_bias, mlp mlp_ratio, rotary rope,"
        "gate mlp_activation, fuse_from fusion_layer, latents num_bottlenecks,"
        "separate share_encoder, drop_path drop_path_rate, reduce token_reduction,"
        "reduce_after token_reduction_layers, reduce_keep token_keep_rate, pool pool_type,"
        "pool_heads pool_num_heads, embedding embed_dim, decoder_heads decoder_num_heads,"
        "attention attention_impl, unroll unroll_layers, remat remat_policy",
        "FinetuneSpec": "how method, also extra_trainable, rank lora_rank, alpha lora_alpha,"
        "targets target_modules, size adapter_dim, unfreeze gradual_unfreeze_fraction",
        "RobustSpec": "sam sam_rho, ascents attack_steps",
        "ModelSoupSpec": "how method, newest last_k_checkpoints",
        "ActiveLearningSpec": "how strategy, number num_clips",
        "MaskSpec": f"{_MASK}, predict target_ratio",
        "MaskedAutoencoderSpec": "normalise norm_pix_loss",
        "ClassifySpec": "focus focal_gamma, balance class_balance_beta, consistency rdrop_weight",
        "FeatureDistillationSpec": f"{_MASK}, teacher teacher_modality",
        "FuturePredictionSpec": "moment split_range",
        "PlaybackSpeedSpec": "doublings max_doublings",
        "SynchronizationSpec": "pair modalities, shifts max_shift, step shift_stride, how method,"
        "other mismatch_prob",
        "ContrastiveSpec": "pair modalities, keep mask_ratio",
        "TextMatchingSpec": "other mismatch_prob",
        "TemporalAlignmentSpec": "bins num_bins",
        "MaskedLmSpec": "keep mask_ratio",
        "MaskedVisualTokensSpec": "codes codebook_size, examples kmeans_samples",
        "PseudoLabelSpec": "keep mask_ratio, noise noise_std",
        "ImportSpec": "source weights, classes num_classes, frames num_frames, size image_size,"
        "grid source_grid, export export_path",
        "PredictSpec": "video videos, labels class_names, frames num_frames, rate fps,"
        "windows num_views, top top_k",
        "ProbeSpec": f"{_SPLITS}, alone per_modality, neighbours knn_k, attentive attentive_steps",
        "LinearProbeSpec": f"{_SPLITS}, keep feature_cache_dir, frames num_frames,"
        "seconds clip_seconds",
        "ExtractFeaturesSpec": "folder out_dir, seconds window_seconds, stride stride_seconds,"
        "cells pool_grid, frames num_frames, rows batch_size, max_bad max_unreadable",
        "PlanSpec": "settings overrides, rows per_device_batch_size",
    }.items()
}

# old values by new key, or by Class.key if they apply to one class only
VALUES: dict[str, dict[str, str]] = {
    "job": JOBS,
    **dict.fromkeys(("modalities", "modality", "teacher_modality"), MODALITIES),
    "normalization": _table("each standardize, length rms"),
    "frame_sampling": _table("span uniform, segments segment"),
    "policy": _table("runs run_length"),
    "split_axes": _table("both spacetime"),
    "split_criterion": _table("squared squared_error, absolute absolute_error"),
    "peak_flops": _table("known table"),
    "faults": _table(
        "damage corrupt_checkpoint, disk disk_full, pair lost_process, kill sigkill, term sigterm"
    ),
    "token_reduction": _table("drop prune"),
    "pool_type": _table("token cls"),
    "attention_impl": _table("plain xla"),
    "remat_policy": _table("blocks full, attention dots_no_batch, elementwise dots"),
    "mask_type": _table("adaptive low_variance"),
    "negatives": _table("next shifted"),
    "FinetuneSpec.method": _table(
        "linear linear_probe, probe attentive_probe, prompt vpt_shallow, prompt_deep vpt_deep"
    ),
    "ModelSoupSpec.method": _table("average uniform"),
    "SynchronizationSpec.method": _table("question joint"),
    "FeatureDistillationSpec.loss": _table("smooth smooth_l1"),
    "FramewiseSpec.loss": _table("squared mse, binary sigmoid"),
    "ClassifySpec.loss": _table("binary sigmoid"),
    "FuturePredictionSpec.target": _table("normalised norm_pix, plain pixels, change residual"),
    "PseudoLabelSpec.teacher": _table("average ema"),
    "PseudoLabelSpec.target": _table("label hard"),
}

# Parts of parameter paths (whole names): extend this table when a module is renamed.
PARAMETERS: dict[str, str] = {
    **{
        f"{part}_{old}": f"{part}_{new}"
        for part in ("payload", "modality", "norm", "project", "blocks", "cross", "codebook")
        for old, new in MODALITIES.items()
    },
    **{
        f"{part}_{old}": f"{new}_head"
        for part in ("questions", "each")
        for old, new in OBJECTIVES.items()
    },
    **{f"moment_{old}": f"framewise_head_{new}" for old, new in MODALITIES.items()},
    "moment_audio": "framewise_head_audio",
    "compare": "projection",
    "lag": "synchronization_projection",
}

METRICS = _table(  # METRIC of OBJECTIVE/METRIC
    "apart rdrop_kl, all_right exact_match, spread feature_std, asked valid_fraction,"
    "near acc_within_1, recall batch_recall_at_1, sharpness logit_scale, codes codebook_perplexity,"
    "right accuracy, sure confident_fraction, cosine cosine_similarity, seconds mae_seconds"
)
FIGURES = _table(  # per step in metrics.jsonl and timing.jsonl, per split in results.json
    "rate learning_rate, data_wait_share data_wait_fraction, fill packing_efficiency,"
    "host_mib host_peak_mib, device_mib device_peak_mib, seconds_since_start wall_seconds,"
    "seconds_of_steps train_seconds, parameters num_params,"
    "parameters_trained num_trainable_params, parameters_saved num_saved_params, clips num_clips,"
    "map mAP, all_right exact_match"
)
_BY_PARAMETERS = ("grad_norm/", "param_norm/")  # metrics named after parameter groups


_OLD_PARAMETERS = {new: old for old, new in PARAMETERS.items()}


def parameter(path: str, names: Mapping[str, str] = PARAMETERS) -> str:
    """Renames a parameter path, or a regular expression for paths, to today's names."""
    return _pattern(tuple(names)).sub(lambda match: names[match[0]], path)


def old_parameter(path: str) -> str:
    """Returns a parameter's path of format 1, the sort key of sums over parameters."""
    return parameter(path, _OLD_PARAMETERS)


def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)")


def figure(name: str) -> str:
    """Renames a metric of metrics.jsonl, timing.jsonl or a split of results.json."""
    if name.startswith(_BY_PARAMETERS):
        return parameter(name)
    objective, slash, metric = name.partition("/")
    if not slash:
        return FIGURES.get(name, name)
    return f"{OBJECTIVES.get(objective, objective)}/{METRICS.get(metric, metric)}"


def figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the keys of a metrics dict."""
    return {figure(name): value for name, value in values.items()}


def results(found: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the keys of results.json."""
    if "bad" not in found:
        return dict(found)
    stages = {stage: _splits(splits) for stage, splits in found.items() if stage != "bad"}
    return stages | {"unreadable": found["bad"]}


def _splits(splits: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the figures of each split of a stage, and those of each member of a soup."""
    renamed = {k: figures(v) if isinstance(v, Mapping) else v for k, v in splits.items()}
    if "ingredients" in splits:
        members = splits["ingredients"]
        renamed["members"] = {label: figures(metrics) for label, metrics in members.items()}
        del renamed["ingredients"]
    return renamed


def _complement(share: float) -> float:
    return round(1 - share, 12)  # 1 - 0.4 is 0.6, not 0.6000000000000001


def _sweep_metric(text: str) -> str:
    stage, slash, name = text.partition("/")
    split, _, metric = name.partition("/")
    return f"{stage}/{split}/{figure(metric)}" if slash else text


_NEVER = 10**9  # steps, so that a run is measured at its end alone, as 0 once said

_CONVERT: dict[str, Callable[[Any], Any]] = {  # by the new key
    "mask_ratio": _complement,
    "share_encoder": lambda separate: not separate,
    "val_every_steps": lambda steps: steps or _NEVER,
    "best_metric": figure,
    "metric": _sweep_metric,
    **dict.fromkeys(("extra_trainable", "freeze", "target_modules"), parameter),
}
_NOTES = {
    "mask_ratio": ", which is 1 minus the old value",
    "share_encoder": ", which is the opposite",
    "adapter_dim": ", or num_virtual_tokens where the method is prefix, vpt_shallow or vpt_deep",
}


def upgrade(spec: type, section: Mapping[str, Any], top: type | None = None) -> dict[str, Any]:
    """Upgrades a config section of format 1, with its subsections, to today's `spec`.

    top: the spec of the whole config, whose sections a stage or sweep may override.
    """
    top, upgraded = top or spec, {}
    for old, value in section.items():
        new = key(spec, old)
        if old == "size" and new == "adapter_dim":
            vectors = section.get("how") in ("prefix", "prompt", "prompt_deep")
            new = "num_virtual_tokens" if vectors else "adapter_dim"
        if new in _CONVERT and (new != old or isinstance(value, str)):
            value = _CONVERT[new](value)
        upgraded[new] = _upgraded(spec, new, _values(spec, new, value), top)
    return upgraded


def _upgraded(spec: type, name: str, value: Any, top: type) -> Any:
    """Upgrades the subsections in the value of a key."""
    field = next(
        (candidate for candidate in dataclasses.fields(spec) if candidate.name == name), None
    )
    if field is None or not isinstance(value, Mapping | list | tuple):
        return value
    table = field.metadata.get("table")
    if table is not None:
        names = {OBJECTIVES.get(objective, objective): inner for objective, inner in value.items()}
        return {
            objective: upgrade(table[objective], inner, top) for objective, inner in names.items()
        }
    inner = inner_spec(field.type)
    if not isinstance(value, Mapping):
        return [upgrade(inner, item, top) for item in value] if inner else value
    if inner is not None and inner is not field.type:
        return {key: upgrade(inner, part, top) for key, part in value.items()}
    if inner is None and name == "runs":
        return {key: upgrade(top, part, top) for key, part in value.items()}
    changes = next(
        (candidate.type for candidate in dataclasses.fields(top) if candidate.name == name), None
    )
    inner = inner or (changes if dataclasses.is_dataclass(changes) else None)
    return upgrade(inner, value, top) if inner else value


def inner_spec(kind: Any) -> type | None:
    """Returns the dataclass in a field's type; None without one."""
    return next(
        (candidate for candidate in (kind, *get_args(kind)) if dataclasses.is_dataclass(candidate)),
        None,
    )


def _values(spec: type, name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_values(spec, name, item) for item in value]
    table = values_of(spec, name)
    return table.get(value, value) if isinstance(value, str) else value


def values_of(spec: type, name: str) -> Mapping[str, str]:
    """Returns {old value: new value} of a key."""
    return VALUES.get(f"{spec.__name__}.{name}", VALUES.get(name, {}))


def key(spec: type, old: str) -> str:
    """Returns today's name of a key."""
    known = {field.name for field in dataclasses.fields(spec)}
    for base in spec.__mro__:
        new = KEYS.get(base.__name__, {}).get(old, "")
        if new in known:
            return new
    return old


def answer_key(spec: type, name: str, where: str) -> str:
    """Returns the error for a key of format 1; '' for other unknown keys."""
    new = key(spec, name)
    return f"{where}.{name} is now {where}.{new}{_NOTES.get(new, '')}." if new != name else ""


def answer_value(spec: type, field: dataclasses.Field, value: Any) -> str:
    """Returns the error for a value of format 1; '' for other values."""
    table, names = values_of(spec, field.name), field.metadata.get("names", ())
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, str) and item in table and item not in names:
            return f"{spec.__name__}.{field.name}: {item!r} is now {table[item]!r}."
    return ""


def path(spec: type | None, text: str) -> str:
    """Renames a dotted path of keys below `spec`; unknown parts stay."""
    parts, table, free = [], None, False
    for part in text.split("."):
        if free or spec is None:
            new, free = part, False
        elif table is not None:
            new = OBJECTIVES.get(part, part)
            spec, table = table.get(new), None
        else:
            new = key(spec, part)
            field = next(
                (candidate for candidate in dataclasses.fields(spec) if candidate.name == new), None
            )
            table = field.metadata.get("table") if field else None
            inner = inner_spec(field.type) if field else None
            free = inner is not None and inner is not field.type
            spec = spec if table is not None else inner
        parts.append(new)
    return ".".join(parts)


def command(spec: type, text: str) -> str:
    """Renames the experiment file and the keys of a command line; `spec` is its config's class."""
    for old, new in FILES.items():
        text = text.replace(f"--config {old} ", f"--config {new} ")
    return re.sub(r"--config\.([\w.]+)", lambda match: f"--config.{path(spec, match[1])}", text)
