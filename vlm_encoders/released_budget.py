"""What one image costs in published models, by the arithmetic of our own parts."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_encoders.budget import image_counts
from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling import PRESETS, build_tiler
from vlm_encoders.tiling.counts import marks_in
from vlm_encoders.tiling.plan import Size

__all__ = ["RELEASED", "ReleasedBudget", "ReleasedModel", "released_budgets"]


@dataclass(frozen=True)
class ReleasedModel:
    """How a published model turns an image into tokens.

    Attributes:
        encoder: its spec.
        connector: a recipe that gives as many tokens as the model's own connector.
        tiler: by name, with its layout and markers.
        source: where the model's authors say so.
    """

    encoder: EncoderSpec
    connector: str
    tiler: str
    source: str

    @classmethod
    def of_preset(cls, name: str) -> ReleasedModel:
        """Make the model that a tiler was released with."""
        preset = PRESETS[name]
        return cls(preset.spec(), preset.connector, name, preset.source)


@dataclass(frozen=True)
class ReleasedBudget:
    """What one image costs in a published model.

    Attributes:
        name: of the model.
        views: pictures that its encoder sees.
        per_view: tokens of a view behind the connector, of a tile where views differ.
        total: the token budget; text around the image, such as `<img>`, not counted.
        source: where the model's authors say so.
        markers: marks in that text.
    """

    name: str
    views: int
    per_view: int
    total: int
    source: str
    markers: int = 0


_PRESET_OF = {
    "LLaVA-1.5": "pad",
    "LLaVA-NeXT": "llava-next",
    "LLaVA-OneVision": "llava-onevision",
    "InternVL 1.5 to 3": "internvl",
    "Idefics3": "idefics3",
    "SmolVLM": "smolvlm",
    "Qwen2-VL": "qwen2-vl",
    "Pixtral": "pixtral",
}

RELEASED: dict[str, ReleasedModel] = {
    **{name: ReleasedModel.of_preset(preset) for name, preset in _PRESET_OF.items()},
    "BLIP-2": ReleasedModel(
        encoder_spec("eva-clip-g-14-224"),
        "keep_prefix+qformer+linear",
        "squash",
        "https://arxiv.org/abs/2301.12597",
    ),
}
"""Published models to compare with, by name."""


def released_budgets(image_size: Size) -> list[ReleasedBudget]:
    """Count what an image of (height, width) px costs in each published model.

    Raises:
        VlmError: the size is not positive.
    """
    rows = []
    for name, model in RELEASED.items():
        counts = image_counts(model.encoder, model.connector, build_tiler(model.tiler, model.encoder))
        plan = counts.plan(image_size)
        per_view = counts.page_specs(plan)[plan.main_place].num_tokens
        markers = marks_in(counts.pieces(plan))
        rows.append(ReleasedBudget(name, plan.num_views, per_view, counts.total(plan), model.source, markers))
    return rows
