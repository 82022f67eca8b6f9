"""Any image encoder in front of any language model, with its cost known first."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_encoders.budget import TokenBudget, token_budget
    from vlm_encoders.encoder import Encoder
    from vlm_encoders.encoders.fused import FusedEncoder
    from vlm_encoders.encoders.multiscale import MultiScale
    from vlm_encoders.preprocess import Preprocessor, load_image
    from vlm_encoders.registry import create_encoder, encoder_spec, list_encoders, register_encoder
    from vlm_encoders.spec import EncoderSpec, Stage
    from vlm_encoders.tiling import (
        AnyResTiler,
        InternVLTiler,
        TileLayout,
        TilePlan,
        Tiler,
        WholeImage,
        build_tiler,
        plan_tiles,
    )
    from vlm_encoders.training.config import TrainConfig
    from vlm_encoders.training.evaluate import exact_match
    from vlm_encoders.training.feeding.data import ConversationDataset
    from vlm_encoders.training.trainer import Trainer
    from vlm_encoders.vlm.answer import answer
    from vlm_encoders.vlm.build import build_model, load_llm
    from vlm_encoders.vlm.encode import encode_images
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor
    from vlm_encoders.vlm.stages import (
        STAGE_1,
        STAGE_2,
        STAGE_2_LORA,
        STAGE_3,
        PartPolicy,
        StagePolicy,
        apply_stage,
        trainable_parameters,
    )

__all__ = [
    "STAGE_1",
    "STAGE_2",
    "STAGE_2_LORA",
    "STAGE_3",
    "AnyResTiler",
    "ConversationDataset",
    "Encoder",
    "EncoderSpec",
    "FusedEncoder",
    "InternVLTiler",
    "MultiScale",
    "PartPolicy",
    "Preprocessor",
    "Stage",
    "StagePolicy",
    "TileLayout",
    "TilePlan",
    "Tiler",
    "TokenBudget",
    "TrainConfig",
    "Trainer",
    "VLMProcessor",
    "VisionLanguageModel",
    "WholeImage",
    "answer",
    "apply_stage",
    "build_model",
    "build_tiler",
    "create_encoder",
    "encode_images",
    "encoder_spec",
    "exact_match",
    "list_encoders",
    "load_image",
    "load_llm",
    "plan_tiles",
    "register_encoder",
    "token_budget",
    "trainable_parameters",
]

_HOME = {
    "budget": ("TokenBudget", "token_budget"),
    "encoder": ("Encoder",),
    "encoders.fused": ("FusedEncoder",),
    "encoders.multiscale": ("MultiScale",),
    "preprocess": ("Preprocessor", "load_image"),
    "registry": ("create_encoder", "encoder_spec", "list_encoders", "register_encoder"),
    "spec": ("EncoderSpec", "Stage"),
    "tiling": (
        "AnyResTiler",
        "InternVLTiler",
        "TileLayout",
        "TilePlan",
        "Tiler",
        "WholeImage",
        "build_tiler",
        "plan_tiles",
    ),
    "training.config": ("TrainConfig",),
    "training.feeding.data": ("ConversationDataset",),
    "training.evaluate": ("exact_match",),
    "training.trainer": ("Trainer",),
    "vlm.answer": ("answer",),
    "vlm.build": ("build_model", "load_llm"),
    "vlm.encode": ("encode_images",),
    "vlm.model": ("VisionLanguageModel",),
    "vlm.processor": ("VLMProcessor",),
    "vlm.stages": (
        "STAGE_1",
        "STAGE_2",
        "STAGE_2_LORA",
        "STAGE_3",
        "PartPolicy",
        "StagePolicy",
        "apply_stage",
        "trainable_parameters",
    ),
}
_MODULE = {name: f"vlm_encoders.{module}" for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a name from its module on first use, so that the package itself is light."""
    if name not in _MODULE:
        raise AttributeError(f"module 'vlm_encoders' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)
