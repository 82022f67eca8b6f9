"""The stages of this package, and those of the LLaVA family."""

from __future__ import annotations

from typing import Any

from vlm_encoders.vlm.policy import STAGE_1, STAGE_2, STAGE_2_LORA, STAGE_3, PartPolicy, StagePolicy
from vlm_encoders.vlm.published_stage import PublishedStage

__all__ = ["LLAVA"]

_PAPER = "arXiv 2310.03744, table 9"
_SCRIPTS = "https://github.com/haotian-liu/LLaVA/blob/main/scripts/v1_5"
_NEXT = "https://github.com/LLaVA-VL/LLaVA-NeXT/blob/main/scripts/train"
_SHARE = "https://github.com/InternLM/InternLM-XComposer/blob/main/projects/ShareGPT4V"

# What all of their scripts say.
_COMMON: dict[str, Any] = {
    "connector": "mlp",
    "epochs": 1,
    "warmup_ratio": 0.03,
    "schedule": "cosine",
    "weight_decay": 0.0,
    "precision": "bfloat16",
}
_LLAVA: dict[str, Any] = {
    **_COMMON,
    "encoder": "clip-vit-l-14-336",
    "llm": "lmsys/vicuna-7b-v1.5",
    "max_length": 2048,
}
_ONEVISION: dict[str, Any] = {**_COMMON, "encoder": "siglip-so400m-14-384", "llm": "Qwen/Qwen2-7B-Instruct"}
_CLIPPING = "clipping of gradients is not stated"
_LAYER = "the source reads the encoder's layer -2 without its final norm"


def _train(lr: float) -> PartPolicy:
    return PartPolicy("train", lr=lr)


def _all_trained(name: str) -> StagePolicy:
    return StagePolicy(name, _train(2e-6), _train(1e-5), _train(1e-5))


_OWN = (
    PublishedStage(policy=STAGE_1, what="the connector alone", source=_PAPER),
    PublishedStage(policy=STAGE_2, what="connector and LLM", source=_PAPER),
    PublishedStage(
        policy=STAGE_2_LORA, what="connector, and adapters on the LLM", source=f"{_SCRIPTS}/finetune_lora.sh"
    ),
    PublishedStage(policy=STAGE_3, what="all three parts", source=f"{_NEXT}/finetune_clip.sh"),
)

LLAVA = (
    *_OWN,
    PublishedStage(
        policy=StagePolicy("llava-1.5-stage-1", connector=_train(1e-3)),
        what="LLaVA-1.5, feature alignment on 558K captions",
        source=f"{_PAPER}; {_SCRIPTS}/pretrain.sh",
        batch=256,
        per_process=32,
        notes=_CLIPPING,
        **_LLAVA,
    ),
    PublishedStage(
        policy=StagePolicy("llava-1.5-stage-2", connector=_train(2e-5), llm=_train(2e-5)),
        what="LLaVA-1.5, instruction tuning on 665K conversations",
        source=f"{_PAPER}; {_SCRIPTS}/finetune.sh",
        after="llava-1.5-stage-1",
        batch=128,
        per_process=16,
        notes=f"images are padded to squares (tiler pad), those of stage 1 are not; {_CLIPPING}",
        **_LLAVA,
    ),
    PublishedStage(
        policy=StagePolicy(
            "llava-1.5-stage-2-lora",
            connector=_train(2e-5),
            llm=PartPolicy("lora", lr=2e-4, lora_rank=128, lora_dropout=0.05),
        ),
        what="LLaVA-1.5, instruction tuning by LoRA of rank 128 and alpha 256",
        source=f"{_SCRIPTS}/finetune_lora.sh",
        after="llava-1.5-stage-1",
        batch=128,
        per_process=16,
        notes=f"images are padded to squares (tiler pad); dropout is the default of llava/train/train.py; {_CLIPPING}",
        **_LLAVA,
    ),
    PublishedStage(
        policy=_all_trained("llava-next-stage-2"),
        what="LLaVA-NeXT, all parts on tiled images",
        source=f"{_NEXT}/finetune_clip.sh",
        encoder="clip-vit-l-14-336",
        llm="Qwen/Qwen2-7B-Instruct",
        tiler="llava-next",
        max_length=32768,
        notes=(
            "it goes on from a connector trained as in llava-1.5-stage-1; 4 samples a process, processes are not "
            f"stated; {_CLIPPING}"
        ),
        **_COMMON,
    ),
    PublishedStage(
        policy=StagePolicy("llava-onevision-stage-1", connector=_train(1e-3)),
        what="LLaVA-OneVision, feature alignment on 558K captions",
        source=f"arXiv 2408.03326; {_NEXT}/pretrain_siglip.sh",
        max_length=8192,
        notes=f"16 samples a process, processes are not stated; {_LAYER}; {_CLIPPING}",
        **_ONEVISION,
    ),
    PublishedStage(
        policy=_all_trained("llava-onevision-stage-1.5"),
        what="LLaVA-OneVision, knowledge from 4M captions and documents",
        source="arXiv 2408.03326; https://github.com/LLaVA-VL/LLaVA-NeXT/blob/main/docs/LLaVA_OneVision.md",
        after="llava-onevision-stage-1",
        epochs=1,
        notes="rates and epochs alone are stated there; batch, schedule and lengths are not",
    ),
    PublishedStage(
        policy=_all_trained("llava-onevision-stage-2-si"),
        what="LLaVA-OneVision, instruction tuning on 3.2M single images",
        source=f"arXiv 2408.03326; {_NEXT}/finetune_si.sh",
        after="llava-onevision-stage-1.5",
        batch=256,
        per_process=1,
        max_length=32768,
        notes=f"tiler llava-onevision; batch as recommended there for 7B on 128 processes; {_LAYER}; {_CLIPPING}",
        **_ONEVISION,
    ),
    PublishedStage(
        policy=_all_trained("llava-onevision-stage-2-ov"),
        what="LLaVA-OneVision, 1.6M samples of single images, several images and video",
        source=f"arXiv 2408.03326; {_NEXT}/finetune_ov.sh",
        after="llava-onevision-stage-2-si",
        batch=256,
        per_process=1,
        max_length=32768,
        notes=f"tiler llava-onevision; batch as recommended there for 7B on 128 processes; {_LAYER}; {_CLIPPING}",
        **_ONEVISION,
    ),
    PublishedStage(
        policy=StagePolicy(
            "sharegpt4v-stage-1", PartPolicy("train", lr=2e-5, last_blocks=0.5), _train(2e-5), _train(2e-5)
        ),
        what="ShareGPT4V, 1.2M captions, the encoder's later half trained (blocks 12 to 23 of 24)",
        source=f"arXiv 2311.12793; {_SHARE}/scripts/sharegpt4v/slurm_pretrain_7b.sh",
        after="llava-1.5-stage-1",
        batch=256,
        per_process=16,
        notes=f"the projector comes from LLaVA-1.5; {_CLIPPING}",
        **_LLAVA,
    ),
    PublishedStage(
        policy=StagePolicy("sharegpt4v-stage-2", connector=_train(2e-5), llm=_train(2e-5)),
        what="ShareGPT4V, instruction tuning",
        source=f"{_SHARE}/scripts/sharegpt4v/slurm_finetune_7b.sh",
        after="sharegpt4v-stage-1",
        batch=128,
        per_process=8,
        notes=f"images are padded to squares (tiler pad); {_CLIPPING}",
        **_LLAVA,
    ),
)
