"""What a stage does to each part: data alone, so that stages are listed without torch.

Learning rates of the stages here are the published ones of LLaVA-1.5 (stages 1 and 2,
arXiv 2310.03744, table 9) and LLaVA-NeXT (encoder unfrozen at a fifth of the LLM's rate);
`vlm_encoders.vlm.published` has the recipes of others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from connectors.errors import VlmError

__all__ = [
    "ADAPTERS",
    "PARTS",
    "STAGE_1",
    "STAGE_2",
    "STAGE_2_LORA",
    "STAGE_3",
    "Mode",
    "Part",
    "PartPolicy",
    "StagePolicy",
    "TrainedPart",
]

Part: TypeAlias = Literal["encoder", "connector", "llm"]
PARTS: tuple[Part, ...] = ("encoder", "connector", "llm")
TrainedPart: TypeAlias = Part | Literal["adapter", "encoder adapter", "connector adapter"]
"""What can be trained: a part's own weights, or the low-rank adapters on it; "adapter" are those on the LLM."""
Mode: TypeAlias = Literal["frozen", "train", "lora", "dora", "rslora", "qlora"]
ADAPTERS = ("lora", "dora", "rslora", "qlora")
"""Modes that train low-rank adapters on a part's linear layers and hold its own weights."""


@dataclass(frozen=True)
class PartPolicy:
    """What a stage does to one part, or to one encoder of several.

    Attributes:
        mode: "frozen", "train", or the low-rank adapters that are trained on the linear layers: "lora"
            (arXiv 2106.09685), "dora" (2402.09353), "rslora" (2312.03732), "qlora" (2305.14314, on an LLM
            in 4 bits).
        lr: peak learning rate of the part.
        last_blocks: train only this many blocks from the end, of those that are kept; or a fraction of
            all blocks that the network has, rounded down, where those behind the feature layer count as
            trained: 0.5 of 24 with feature layer -2 trains 11. None for all, and what lies around them.
        lora_rank: rank of the adapters.
        weight_decay: decay of the part's matrices; None for the run's.
        layer_decay: factor on the learning rate from a block to the one before it: 1 behind the last
            block, the factor itself at the last block, the embedding deepest (BEiT, arXiv 2106.08254).
        norms_only: train the weights of the norms alone.
        lora_alpha: scale of the adapters; None for twice the rank.
        lora_dropout: dropout before the adapters.

    Raises:
        VlmError: the options contradict each other.
    """

    mode: Mode = "frozen"
    lr: float = 0.0
    last_blocks: int | float | None = None
    lora_rank: int = 64
    weight_decay: float | None = None
    layer_decay: float | None = None
    norms_only: bool = False
    lora_alpha: float | None = None
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a policy that would train nothing, or say two things at once."""
        if self.mode not in {"frozen", "train", *ADAPTERS}:
            raise VlmError(f"no part mode '{self.mode}'; use frozen, train, {', '.join(ADAPTERS[:-1])} or qlora")
        if self.mode == "frozen" and (self.lr or self.last_blocks is not None):
            raise VlmError(f"a frozen part has no lr ({self.lr}) and no last_blocks; use mode='train'")
        if self.mode != "frozen" and not self.lr > 0:
            raise VlmError(f"mode '{self.mode}' needs a learning rate above 0, got {self.lr}")
        if self.mode == "frozen" and self.weight_decay is not None:
            raise VlmError(
                f"a frozen part has no weight_decay ({self.weight_decay}); leave it out, or use mode='train'"
            )
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise VlmError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        self._check_blocks()
        self._check_adapters()

    def _check_blocks(self) -> None:
        last = self.last_blocks
        if last is not None and (self.mode != "train" or not last > 0 or (isinstance(last, int) and last < 1)):
            raise VlmError(f"last_blocks={last} needs mode='train' and at least one block")
        if isinstance(last, float) and not last < 1:
            raise VlmError(
                f"last_blocks={last} is a fraction of all blocks, below 1; give a whole number to count them"
            )
        if self.norms_only and self.mode != "train":
            raise VlmError(f"norms_only trains norms and nothing else, the mode is '{self.mode}'; use mode='train'")
        if self.layer_decay is not None and self.mode != "train":
            raise VlmError(f"layer_decay={self.layer_decay} needs mode='train', the mode is '{self.mode}'")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise VlmError(f"layer_decay is a factor above 0 and at most 1, got {self.layer_decay}")

    def _check_adapters(self) -> None:
        if self.lora_rank < 1:
            raise VlmError(f"lora_rank must be at least 1, got {self.lora_rank}")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise VlmError(f"lora_alpha must be above 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise VlmError(f"lora_dropout is a share from 0 to below 1, got {self.lora_dropout}")
        if not self.adapts and (self.lora_alpha is not None or self.lora_dropout):
            raise VlmError(
                f"lora_alpha and lora_dropout are of adapters, the mode is '{self.mode}'; use one of "
                f"{', '.join(ADAPTERS)}, or leave them out"
            )

    @property
    def trains(self) -> bool:
        """Whether anything of the part trains."""
        return self.mode != "frozen"

    @property
    def adapts(self) -> bool:
        """Whether low-rank adapters train in place of the part's own weights."""
        return self.mode in ADAPTERS

    def words(self, blocks: int | None = None) -> str:
        """Say in a table's cell what trains: "frozen", "train", "last 12 blocks", "norms" or "lora r=128".

        Args:
            blocks: how many blocks `last_blocks` trains of the network at hand; None where there is none.
        """
        if self.adapts:
            return f"{self.mode} r={self.lora_rank}"
        count = self.last_blocks if blocks is None else blocks
        if isinstance(count, float):
            last = f"{count:.0%} of the blocks"
        else:
            last = "" if count is None else f"{count} block{'s' * (count != 1)}"
        said = [
            *(["norms"] if self.norms_only else []),
            *([f"last {last}"] if last else []),
        ] or [self.mode]
        decay = "" if self.layer_decay is None else f", layer decay {self.layer_decay:g}"
        return ", ".join(said) + decay

    @property
    def alpha(self) -> float:
        """The scale of the adapters, twice the rank where none is given."""
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True)
class StagePolicy:
    """A training stage: one policy a part.

    Attributes:
        name: the stage's name in reports and checkpoints.
        encoder: policy of the image encoder; of several that are fused, of each alike, or a tuple of
            policies, one an encoder.
        connector: policy of the connector, and of all else that is learned between encoder and LLM.
        llm: policy of the language model.

    Raises:
        VlmError: an option is asked of a part that does not have it.
    """

    name: str
    encoder: PartPolicy | tuple[PartPolicy, ...] = PartPolicy()
    connector: PartPolicy = PartPolicy()
    llm: PartPolicy = PartPolicy()

    def __post_init__(self) -> None:
        """Hold each option to the parts that have it."""
        if not self.policies("encoder"):
            raise VlmError(f"stage '{self.name}' has no policy for the encoder; give one, or one an encoder")
        for part in PARTS:
            for policy in self.policies(part):
                self._check(part, policy)

    def policies(self, part: Part) -> tuple[PartPolicy, ...]:
        """Give the policies of one part: one, or one an encoder."""
        if part == "encoder":
            return self.encoder if isinstance(self.encoder, tuple) else (self.encoder,)
        return (self.connector if part == "connector" else self.llm,)

    def part(self, part: Part) -> PartPolicy:
        """Give the policy of one part; of several encoders that of the first that trains."""
        policies = self.policies(part)
        return next((policy for policy in policies if policy.trains), policies[0])

    def with_lr(self, lr: float | None) -> StagePolicy:
        """Give the same stage with one peak learning rate for every part that trains; None changes nothing."""
        if lr is None:
            return self

        def at(policy: PartPolicy) -> PartPolicy:
            return replace(policy, lr=lr) if policy.trains else policy

        encoder = tuple(map(at, self.encoder)) if isinstance(self.encoder, tuple) else at(self.encoder)
        return StagePolicy(self.name, encoder, at(self.connector), at(self.llm))

    def _check(self, part: Part, policy: PartPolicy) -> None:
        if part != "llm" and policy.mode == "qlora":
            raise VlmError(f"stage '{self.name}' asks QLoRA of the {part}; only the llm is held in 4 bits, use 'lora'")
        if part == "connector" and policy.last_blocks is not None:
            raise VlmError(f"stage '{self.name}' asks last_blocks of the connector; encoder and llm alone have blocks")
        if part == "connector" and policy.layer_decay is not None:
            raise VlmError(f"stage '{self.name}' asks layer_decay of the connector; encoder and llm alone have blocks")


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
