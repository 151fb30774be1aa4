# SPDX-License-Identifier: Apache-2.0
"""Names of settings in other libraries, with their names here.

Names that no spec has are ignored, so a group may list old and new names. A section prefix as in
`optim.rate` restricts a name to that section.
"""

_GROUPS = (
    ("optim.rate", "optim.learning_rate", "lr", "base_lr", "peak_lr", "max_lr"),
    ("rows", "batch_size", "batch", "bs", "train_batch_size"),
    ("weight_decay", "wd", "decay"),
    ("warmup", "warmup_ratio", "warmup_steps", "warmup_epochs"),
    ("final", "final_lr_ratio", "min_lr", "final_lr"),
    ("clip_norm", "grad_clip_norm", "grad_clip", "max_grad_norm", "clip_grad", "clip_grad_norm"),
    ("b1", "beta1", "adam_beta1"),
    ("b2", "beta2", "adam_beta2"),
    ("optim.name", "optimizer", "opt"),
    ("steps", "num_steps", "max_steps", "num_train_steps", "total_steps", "iterations"),
    ("epochs", "num_epochs", "num_train_epochs", "max_epochs"),
    ("accumulate", "grad_accum_steps", "gradient_accumulation_steps", "accum_steps"),
    ("init", "init_from", "pretrained", "finetune_from", "resume_from"),
    ("ema", "ema_decay", "model_ema"),
    ("patience", "early_stopping_patience", "early_stopping"),
    ("data.frames", "data.num_frames", "clip_length", "n_frames"),
    ("data.size", "data.image_size", "img_size", "resolution", "input_size", "crop_size"),
    ("data.stride", "data.frame_stride", "sampling_rate", "frame_interval"),
    ("data.seconds", "data.clip_seconds", "duration"),
    ("particles.base", "particles.patch_size", "tubelet_size", "patch"),
    ("width", "hidden_size", "hidden_dim", "d_model", "dim"),
    ("depth", "num_layers", "num_hidden_layers", "layers", "n_layers"),
    ("heads", "num_heads", "num_attention_heads", "n_heads"),
    ("mlp", "mlp_ratio"),
    ("gate", "mlp_activation", "activation", "act_layer"),
    ("rotary", "rope"),
    ("drop_path", "drop_path_rate", "stochastic_depth"),
    ("pool", "pool_type", "global_pool", "pooling"),
    ("dtype", "precision", "amp", "mixed_precision"),
    ("remat", "remat_policy", "gradient_checkpointing", "checkpoint_activations"),
    ("masked_autoencoder", "mae", "videomae", "reconstruction"),
    ("jepa", "ijepa", "vjepa", "byol", "data2vec"),
    ("contrastive", "clip", "infonce", "info_nce", "simclr", "moco"),
    ("classify", "classification", "supervised", "cross_entropy", "ce"),
    ("feature_distillation", "distillation", "kd"),
    ("masked_lm", "mlm", "bert"),
    ("masked_visual_tokens", "beit"),
    ("synchronization", "avsync"),
    ("masked.keep", "masked_autoencoder.mask_ratio"),
    ("mask", "mask_type"),
    ("normalise", "norm_pix_loss"),
    ("tune.how", "finetune.method", "peft", "finetune_method"),
    ("tune.rank", "lora_rank", "lora_r"),
    ("tune.alpha", "lora_alpha"),
    ("augment.flip", "hflip_prob", "hflip"),
    ("augment.crop", "crop_scale", "rrc_scale"),
    ("jitter", "color_jitter"),
    ("erase", "random_erasing_prob", "reprob"),
    ("operations", "randaug_num_ops"),
    ("magnitude", "randaug_magnitude"),
    ("threads", "num_threads"),
    ("workers", "num_workers", "dataloader_num_workers"),
    ("val_every", "val_every_steps", "eval_steps", "eval_every"),
    ("checkpoint.every", "save_interval_steps", "save_steps", "save_every"),
    ("log.every", "every_steps", "logging_steps", "log_every"),
    ("checkpoint.keep", "checkpoint.max_to_keep", "save_total_limit"),
    ("wandb", "wandb_project"),
    ("select", "best_metric", "metric_for_best_model", "monitor"),
    ("views", "num_views", "test_num_segment"),
    ("data.source", "dataset", "data_dir", "data_path"),
)


def synonyms(name: str) -> tuple[str, ...]:
    """Returns other names of a setting, most likely first, some with their section ('optim.rate');
    () if unknown.
    """
    groups = [group for group in _GROUPS if name in {last_part(other) for other in group}]
    return tuple(
        dict.fromkeys(other for group in groups for other in group if last_part(other) != name)
    )


def last_part(path: str) -> str:
    """Returns 'rate' of 'optim.rate'."""
    return path.rpartition(".")[2]
