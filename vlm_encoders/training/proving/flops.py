"""What a training step costs each unit: operations of the matrix products, forward and backward.

A pass of gradients through a unit to its inputs costs as much as its forward pass, and so do the gradients of its
weights, in proportion to those that train; activations that are computed again are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connectors.errors import VlmError
from connectors.recipe import recipe_of
from vlm_encoders.cost import encoder_flops, measure_connector
from vlm_encoders.vlm.describe import PartReport, describe_parts
from vlm_encoders.vlm.stages import PARTS
from vlm_encoders.vlm.units import Unit, units

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["TypicalSample", "llm_flops", "unit_flops"]


@dataclass(frozen=True)
class TypicalSample:
    """The means of some samples.

    Attributes:
        tokens: LLM tokens, T.
        supervised: those that are learned.
        image_tokens: those at image places.
        images: images.
        views: views of all its images.
    """

    tokens: float
    supervised: float
    image_tokens: float
    images: float
    views: float

    def __str__(self) -> str:
        """Say it in words."""
        return (
            f"a sample of {self.tokens:.0f} tokens, {self.image_tokens:.0f} of {self.images:.2g} images in "
            f"{self.views:.2g} views and {self.supervised:.0f} supervised"
        )


def unit_flops(model: VisionLanguageModel, sample: TypicalSample) -> list[float | None]:
    """Count the FLOPs of a training step on one sample, unit by unit; None where they cannot be counted.

    Args:
        model: a model whose stage is applied.
        sample: what it costs.
    """
    found: list[float | None] = []
    all_units, rows = units(model), describe_parts(model)
    for unit, row in zip(all_units, rows, strict=True):
        # The encoders of a joint stand side by side, so one is not before the other.
        before = PARTS[: PARTS.index(unit.part)]
        upstream = any(each.trainable for each in rows if each.part in before)
        forward = _forward(model, unit, sample)
        found.append(None if forward is None else forward * _passes(unit, row, upstream=upstream))
    return found


def llm_flops(llm: Any, tokens: float, supervised: float) -> float | None:
    """Count the FLOPs of a forward pass with logits at the supervised tokens alone.

    2 T for each weight of a layer's matrices, 4 T^2 A a layer for attention of total head width A (as
    `torch.utils.flop_counter`, which halves nothing for a causal mask), and 2 S V H for the head.

    Returns:
        FLOPs; None for experts, of which a token sees some, and for layers without attention.
    """
    inner = llm.get_base_model() if hasattr(llm, "get_base_model") else llm
    config = inner.config.get_text_config(decoder=True)
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if not heads or not layers:
        return None
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    outside = {id(inner.get_input_embeddings().weight), id(inner.get_output_embeddings().weight)}
    inside = [each for each in llm.parameters() if each.ndim > 1 and id(each) not in outside]
    matrices = sum(_numel(each) for each in inside)
    attention = 4 * tokens**2 * heads * head_width * layers
    return float(2 * tokens * matrices + attention + 2 * supervised * config.vocab_size * config.hidden_size)


def _numel(parameter: Any) -> int:
    # Weights in 4 bits lie packed; their state knows the shape.
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def _forward(model: VisionLanguageModel, unit: Unit, sample: TypicalSample) -> float | None:
    if unit.part == "llm":
        return llm_flops(model.llm, sample.tokens, sample.supervised)
    if unit.part == "encoder":
        flops = encoder_flops(unit.module.spec)  # type: ignore[arg-type]
        return None if flops is None else flops * _times(model, unit) * sample.views
    try:
        width = model.token_spec.dim
        tokens = model.layout.connector_spec(model.encoder.token_spec)
        return measure_connector(recipe_of(model.connector, width), tokens, width)[2] * sample.views
    except VlmError:
        return None


def _times(model: VisionLanguageModel, unit: Unit) -> int:
    """Give how often one view runs an encoder."""
    inside = model.encoder.spec.encodings
    place = unit.name.rpartition(".")[2]
    return inside[int(place)][1] if inside and place.isdigit() else 1


def _passes(unit: Unit, row: PartReport, *, upstream: bool) -> float:
    """Give the passes of a step, the forward pass being 1."""
    trained = row.trainable / row.parameters if row.parameters else 0.0
    # Adapters and norms lie in the first block too.
    through = 1.0 if upstream or unit.policy.adapts or unit.policy.norms_only else trained
    return 1.0 + through + trained
