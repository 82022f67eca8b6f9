"""The stages of InternVL, Prismatic, Cambrian and BLIP-2."""

from __future__ import annotations

from typing import Any

from vlm_encoders.vlm.policy import PartPolicy, StagePolicy
from vlm_encoders.vlm.published_stage import PublishedStage

__all__ = ["OTHERS"]

_INTERNVL = "https://github.com/OpenGVLab/InternVL/blob/main/internvl_chat/shell/internvl2.5"
_INTERNVL_8B = "internvl2_5_8b_internlm2_5_7b_dynamic_res"
_PRISMATIC = "https://github.com/TRI-ML/prismatic-vlms/blob/main/prismatic/conf/models.py"
_CAMBRIAN = "https://github.com/cambrian-mllm/cambrian"
_CAMBRIAN_SCRIPTS = f"arXiv 2406.16860; {_CAMBRIAN}#hyperparameters; {_CAMBRIAN}/blob/main/scripts/cambrian"
_LAVIS = "https://github.com/salesforce/LAVIS/blob/main/lavis/projects/blip2/train/pretrain_stage2.yaml"

_INTERNVL_ALL: dict[str, Any] = {
    "encoder": "internvit-300m-14-448",
    "connector": "pixel_shuffle:factor=2+norm+mlp",
    "llm": "internlm/internlm2_5-7b-chat",
    "tiler": "internvl",
    "per_process": 1,
    "schedule": "cosine",
    "weight_decay": 0.05,
    "max_length": 16384,
    "pack_tokens": 16384,
    "precision": "bfloat16",
}
_INTERNVL_NOTE = (
    "a sample of the batch is a pack of 16384 tokens; the source weighs samples by the root of their supervised "
    "tokens; clipping of gradients is not stated"
)
_INTERNVL_STEPS = f"{_INTERNVL_NOTE}; steps are an upper bound there, of which 100 are warm-up"
_PRISMATIC_ALL: dict[str, Any] = {
    "encoder": "clip-vit-l-14-336",
    "connector": "mlp",
    "llm": "lmsys/vicuna-7b-v1.5",
    "tiler": "pad",
    "batch": 128,
    "per_process": 16,
    "epochs": 1,
    "warmup_ratio": 0.03,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "max_length": 2048,
    "precision": "bfloat16",
    "notes": "the released Prisms train 2 epochs",
}
_CAMBRIAN_ALL: dict[str, Any] = {
    "batch": 512,
    "per_process": 8,
    "epochs": 1,
    "schedule": "cosine",
    "weight_decay": 0.0,
    "max_length": 2048,
}
_CAMBRIAN_NOTE = (
    "the source's model also has samplers inside the LLM, which ours has not; its scripts are for TPU and state no "
    "dtype of the forward pass, nor clipping of gradients"
)


def _train(lr: float) -> PartPolicy:
    return PartPolicy("train", lr=lr)


OTHERS = (
    PublishedStage(
        policy=StagePolicy("internvl-2.5-stage-1", connector=_train(2e-4)),
        what="InternVL 2.5 8B, MLP warm-up",
        source=f"arXiv 2412.05271; {_INTERNVL}/stage1/{_INTERNVL_8B}_stage1.sh",
        batch=512,
        steps=100_000,
        warmup_ratio=0.001,
        notes=_INTERNVL_STEPS,
        **_INTERNVL_ALL,
    ),
    PublishedStage(
        policy=StagePolicy("internvl-2.5-stage-1.5", _train(1e-5), _train(1e-5)),
        what="InternVL 2.5 8B, incremental learning of the encoder",
        source=f"arXiv 2412.05271; {_INTERNVL}/stage1.5/{_INTERNVL_8B}_stage1_5.sh",
        after="internvl-2.5-stage-1",
        batch=1024,
        steps=100_000,
        warmup_ratio=0.001,
        notes=f"{_INTERNVL_STEPS}; the encoder has drop path 0.1",
        **_INTERNVL_ALL,
    ),
    PublishedStage(
        policy=StagePolicy("internvl-2.5-stage-2", _train(4e-5), _train(4e-5), _train(4e-5)),
        what="InternVL 2.5 8B, instruction tuning of all parts",
        source=f"arXiv 2412.05271; {_INTERNVL}/stage2/{_INTERNVL_8B}_stage2.sh",
        after="internvl-2.5-stage-1.5",
        batch=512,
        epochs=1,
        warmup_ratio=0.03,
        notes=f"{_INTERNVL_NOTE}; the epoch is 5500 steps there; the encoder has drop path 0.1",
        **_INTERNVL_ALL,
    ),
    PublishedStage(
        policy=StagePolicy("prismatic-single-stage", connector=_train(2e-5), llm=_train(2e-5)),
        what="Prismatic 7B, one stage without alignment, the encoder frozen",
        source=f"arXiv 2402.07865, section 4.1; {_PRISMATIC} (one-stage+7b)",
        **_PRISMATIC_ALL,
    ),
    PublishedStage(
        policy=StagePolicy("prismatic-single-stage-tuned", _train(2e-5), _train(2e-5), _train(2e-5)),
        what="Prismatic 7B, one stage without alignment, the encoder trained too",
        source=f"arXiv 2402.07865, section 4.1; {_PRISMATIC} (full-ft-one-stage+7b)",
        **_PRISMATIC_ALL,
    ),
    PublishedStage(
        policy=StagePolicy("cambrian-1-stage-1", connector=_train(1e-4)),
        what="Cambrian-1 8B, the visual connector (SVA) on 2.5M captions",
        source=f"{_CAMBRIAN_SCRIPTS}/pretrain_cambrian_8b.sh",
        warmup_ratio=0.06,
        notes=f"1e-4 is the rate of the SVA, the maps around it have 1e-3 there; {_CAMBRIAN_NOTE}",
        **_CAMBRIAN_ALL,
    ),
    PublishedStage(
        policy=StagePolicy("cambrian-1-stage-2", connector=_train(4e-5), llm=_train(4e-5)),
        what="Cambrian-1 8B, instruction tuning on Cambrian-7M",
        source=f"{_CAMBRIAN_SCRIPTS}/finetune_cambrian_8b.sh",
        after="cambrian-1-stage-1",
        warmup_ratio=0.03,
        notes=_CAMBRIAN_NOTE,
        **_CAMBRIAN_ALL,
    ),
    PublishedStage(
        policy=StagePolicy("blip-2-stage-2", connector=_train(1e-4)),
        what="BLIP-2, the Q-Former learns to speak to a frozen LLM",
        source=f"arXiv 2301.12597, section 3.3; {_LAVIS}",
        encoder="eva-clip-g-14-224",
        connector="norm+qformer+linear",
        llm="facebook/opt-2.7b",
        epochs=10,
        schedule="cosine",
        floor_ratio=0.1,
        weight_decay=0.05,
        notes=(
            "64 samples a process, processes are not stated; 2000 steps of warm-up; the Q-Former comes from a first "
            "stage of its own; the source reads the encoder's layer -2; length and clipping are not stated"
        ),
    ),
)
