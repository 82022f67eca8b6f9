"""Entries of transformers' configs: which change a token, and their form in `EncoderSpec.options`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vlm_encoders.spec import Options

__all__ = ["LOOSE", "as_entry", "as_option", "changed_entries", "own_entries", "telling_entries"]

_HEADS = ("pooler_output_size", "pooler_act", "projection_dim", "num_labels", "vocab_size")
_BACKBONE = ("stage_names", "out_features", "out_indices", "apply_layernorm", "reshape_hidden_states", "add_fpn")
_PRETRAINING = ("initializer_range", "initializer_factor", "encoder_stride", "mask_ratio", "norm_pix_loss")
_DECODER = ("decoder_num_attention_heads", "decoder_hidden_size", "decoder_num_hidden_layers")
_SEGMENTING = ("pool_scales", "use_auxiliary_head", "auxiliary_loss_weight", "auxiliary_channels")
_SEGMENTING_MORE = ("auxiliary_num_convs", "auxiliary_concat_input", "semantic_loss_ignore_index")
_SILENT = frozenset(
    (*_HEADS, *_BACKBONE, *_PRETRAINING, *_DECODER, "decoder_intermediate_size", *_SEGMENTING, *_SEGMENTING_MORE)
)

LOOSE = frozenset(
    (
        *("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"),
        *("projection_dropout", "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"),
        *("layerscale_value", "layer_scale_init_value", "layer_scale_init", "layer_scale_initial_scale"),
    )
)
"""Entries that matter in training, or before weights are loaded: a checkpoint's may differ from the encoder's."""


def own_entries(config: Any) -> list[str]:
    """Name the entries that a config's class has and other classes need not: sizes, activations, rates."""
    general = _general()
    return [key for key in config.to_dict() if key not in general and not key.startswith("_")]


def telling_entries(config: Any) -> dict[str, Any]:
    """Give the entries of a config that can change a token, hashable where they are lists or dicts."""
    return {key: as_option(value) for key, value in _telling(config.to_dict(), _general()).items()}


def _general() -> Collection[str]:
    """Name the entries that every config has."""
    import transformers

    general: dict[str, Any] = transformers.PretrainedConfig().to_dict()
    return general.keys()


def _telling(entries: dict[str, Any], general: Collection[str]) -> dict[str, Any]:
    """Leave out what changes no token, in configs inside a config too."""
    return {
        key: _telling(value, general) if isinstance(value, dict) and "model_type" in value else value
        for key, value in entries.items()
        if key not in general and key not in _SILENT and not key.startswith("_")
    }


def changed_entries(config: Any, default: Any, *, without: Collection[str] = ()) -> Options:
    """Give the telling entries in which `config` differs from the class's default, as options."""
    usual = telling_entries(default)
    own = telling_entries(config)
    return tuple((key, own[key]) for key in usual if key in own and key not in without and own[key] != usual[key])


def as_option(value: Any) -> Any:
    """Give a config's value as hashable data: lists as tuples, dicts as tuples of pairs."""
    if isinstance(value, dict):
        return tuple((key, as_option(item)) for key, item in sorted(value.items()))
    return tuple(as_option(item) for item in value) if isinstance(value, (list, tuple)) else value


def as_entry(value: Any, default: Any) -> Any:
    """Give an option's value as the config takes it: pairs as a dict where its default is one."""
    if isinstance(default, dict) and isinstance(value, tuple):
        return {key: as_entry(item, None) for key, item in value}
    return [as_entry(item, None) for item in value] if isinstance(value, tuple) else value
