"""Stage policies: what trains in each part of a model, and what stays as it is.

Frozen means three things: no gradient, eval mode that outlives `model.train()`, and
no optimizer state. Learning rates are the published ones of LLaVA-1.5 (stages 1 and 2,
arXiv 2310.03744, table 9) and LLaVA-NeXT (encoder unfrozen at a fifth of the LLM's rate).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import nn

from connectors.errors import VlmError

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = [
    "PARTS",
    "STAGES",
    "STAGE_1",
    "STAGE_2",
    "STAGE_2_LORA",
    "STAGE_3",
    "Part",
    "PartPolicy",
    "StagePolicy",
    "TrainedPart",
    "apply_stage",
    "trainable_parameters",
]

Part: TypeAlias = Literal["encoder", "connector", "llm"]
PARTS: tuple[Part, ...] = ("encoder", "connector", "llm")
TrainedPart: TypeAlias = Part | Literal["adapter"]
"""What can be trained: a part's own weights, or the low-rank adapters on the LLM."""


@dataclass(frozen=True)
class PartPolicy:
    """What a stage does to one part.

    Attributes:
        mode: "frozen", "train", or "lora" (low-rank adapters on the LLM's linear layers).
        lr: peak learning rate of the part.
        last_blocks: train only this many blocks from the end (encoder only); None for all.
        lora_rank: rank of the adapters; their scale (alpha) is twice the rank.

    Raises:
        VlmError: the numbers contradict each other.
    """

    mode: Literal["frozen", "train", "lora"] = "frozen"
    lr: float = 0.0
    last_blocks: int | None = None
    lora_rank: int = 64

    def __post_init__(self) -> None:
        """Refuse a policy that would train nothing, or say two things at once."""
        if self.mode not in {"frozen", "train", "lora"}:
            raise VlmError(f"no part mode '{self.mode}'; use frozen, train or lora")
        if self.mode == "frozen" and (self.lr or self.last_blocks is not None):
            raise VlmError(f"a frozen part has no lr ({self.lr}) and no last_blocks; use mode='train'")
        if self.mode != "frozen" and not self.lr > 0:
            raise VlmError(f"mode '{self.mode}' needs a learning rate above 0, got {self.lr}")
        if self.last_blocks is not None and (self.mode != "train" or self.last_blocks < 1):
            raise VlmError(f"last_blocks={self.last_blocks} needs mode='train' and at least one block")
        if self.lora_rank < 1:
            raise VlmError(f"lora_rank must be at least 1, got {self.lora_rank}")


@dataclass(frozen=True)
class StagePolicy:
    """A training stage: one policy a part.

    Attributes:
        name: the stage's name in reports and checkpoints.
        encoder: policy of the image encoder.
        connector: policy of the connector, and of all else that is learned between encoder and LLM.
        llm: policy of the language model.

    Raises:
        VlmError: LoRA is asked of another part than the LLM.
    """

    name: str
    encoder: PartPolicy = PartPolicy()
    connector: PartPolicy = PartPolicy()
    llm: PartPolicy = PartPolicy()

    def __post_init__(self) -> None:
        """Hold each option to the parts that have it."""
        for part in PARTS:
            policy = self.part(part)
            if policy.mode == "lora" and part != "llm":
                raise VlmError(f"stage '{self.name}' asks LoRA of the {part}; only the llm takes adapters, use 'train'")
            if policy.last_blocks is not None and part != "encoder":
                raise VlmError(f"stage '{self.name}' asks last_blocks of the {part}; only the encoder names its blocks")

    def part(self, part: Part) -> PartPolicy:
        """Give the policy of one part."""
        policies: dict[Part, PartPolicy] = {"encoder": self.encoder, "connector": self.connector, "llm": self.llm}
        return policies[part]

    def with_lr(self, lr: float | None) -> StagePolicy:
        """Give the same stage with one peak learning rate for every part that trains; None changes nothing."""
        if lr is None:
            return self
        encoder, connector, llm = (
            policy if policy.mode == "frozen" else replace(policy, lr=lr)
            for policy in (self.encoder, self.connector, self.llm)
        )
        return StagePolicy(self.name, encoder, connector, llm)


STAGE_1 = StagePolicy("stage-1", connector=PartPolicy("train", lr=1e-3))
STAGE_2 = StagePolicy("stage-2", connector=PartPolicy("train", lr=2e-5), llm=PartPolicy("train", lr=2e-5))
STAGE_2_LORA = StagePolicy(
    "stage-2-lora", connector=PartPolicy("train", lr=2e-5), llm=PartPolicy("lora", lr=2e-4, lora_rank=128)
)
STAGE_3 = StagePolicy(
    "stage-3",
    encoder=PartPolicy("train", lr=2e-6),
    connector=PartPolicy("train", lr=1e-5),
    llm=PartPolicy("train", lr=1e-5),
)
STAGES: dict[str, StagePolicy] = {stage.name: stage for stage in (STAGE_1, STAGE_2, STAGE_2_LORA, STAGE_3)}


def apply_stage(model: VisionLanguageModel, policy: StagePolicy) -> VisionLanguageModel:
    """Freeze and unfreeze the parts of a model as a stage says, and keep it so.

    `model.train()` afterwards leaves frozen parts, and the frozen blocks of a partly
    trained encoder, in eval mode.

    Args:
        model: the model; LoRA adapters are added to its LLM where the stage asks for them,
            and merged into it where the stage trains the LLM itself.
        policy: the stage.

    Raises:
        VlmError: the encoder has fewer blocks than `last_blocks`, or the LLM has adapters
            of another rank.
    """
    blocks = model.encoder.blocks()
    last = policy.encoder.last_blocks
    if last is not None and last > len(blocks):
        raise VlmError(f"stage '{policy.name}' trains the last {last} blocks, the encoder has {len(blocks)}")
    if policy.llm.mode == "lora":
        _add_lora(model, policy.llm.lora_rank)
    elif policy.llm.mode == "train" and has_adapter(model.llm):
        # Left in place, they would stand frozen on weights that move beneath them.
        model.llm = model.llm.merge_and_unload()  # type: ignore[operator]
    for part in PARTS:
        mode = policy.part(part).mode
        for name, parameter in model.part_parameters(part):
            is_adapter = "lora_" in name
            parameter.requires_grad_((mode == "train" and not is_adapter) or (mode == "lora" and is_adapter))
        if mode != "frozen":
            model.trained.add("adapter" if mode == "lora" else part)
    if model.newline is None and model.connector.newline is not None:
        # The layout has no row ends, so nothing could train it.
        model.connector.newline.requires_grad_(False)
    if last is not None:
        model.encoder.requires_grad_(False)
        for block in blocks[-last:]:
            block.requires_grad_(True)
    model.stage = policy
    model.train(model.training)
    return model


def hold_frozen(model: VisionLanguageModel, policy: StagePolicy) -> None:
    """Put what a stage froze in eval mode, and the blocks that `last_blocks` trains in train mode."""
    for part in PARTS:
        if policy.part(part).mode == "frozen":
            model.part_module(part).eval()
    last = policy.encoder.last_blocks
    if last is not None:
        # Norms and embeddings outside the blocks are frozen with the encoder.
        model.encoder.eval()
        for block in model.encoder.blocks()[-last:]:
            block.train()


def has_adapter(llm: nn.Module) -> bool:
    """Say whether an LLM is wrapped by peft."""
    # A wrapped LLM means that peft is loaded; importing it for the others would take seconds.
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(llm, peft.PeftModel)


def trainable_parameters(model: VisionLanguageModel) -> dict[Part, list[tuple[str, nn.Parameter]]]:
    """Give the parameters that train, by part, with their names in the model."""
    return {
        part: [(name, parameter) for name, parameter in model.part_parameters(part) if parameter.requires_grad]
        for part in PARTS
    }


def _add_lora(model: VisionLanguageModel, rank: int) -> None:
    from peft import LoraConfig, get_peft_model

    if has_adapter(model.llm):
        configs: dict[str, Any] = model.llm.peft_config  # type: ignore[assignment]
        ranks = sorted({config.r for config in configs.values()})
        if ranks != [rank]:
            raise VlmError(
                f"the LLM has adapters of rank {', '.join(map(str, ranks))}, the stage asks for {rank}; merge them "
                "first: model.llm = model.llm.merge_and_unload()"
            )
        return
    # The adapters see the LLM alone: an encoder with layers of the same names keeps its weights.
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model.llm = get_peft_model(model.llm, config)
