"""What one image costs in published models, by the arithmetic of our own parts."""

from __future__ import annotations

from dataclasses import dataclass

from connectors.tokens import TokenSpec
from vlm_encoders.budget import measure_connector
from vlm_encoders.tiling.anyres import AnyResTiler, InternVLTiler, Tiler, WholeImage
from vlm_encoders.tiling.plan import Size

__all__ = ["RELEASED", "ReleasedBudget", "ReleasedModel", "released_budgets"]


@dataclass(frozen=True)
class ReleasedModel:
    """How a published model turns an image into tokens.

    Attributes:
        tokens: of a view, as its encoder gives them.
        connector: a recipe that gives as many tokens as the model's own connector.
        tiler: with its layout.
        source: where the model's authors say so.
    """

    tokens: TokenSpec
    connector: str
    tiler: Tiler
    source: str


@dataclass(frozen=True)
class ReleasedBudget:
    """What one image costs in a published model.

    Attributes:
        name: of the model.
        views: pictures that its encoder sees.
        per_view: tokens of a view behind the connector.
        total: the token budget; text around the image, such as `<img>`, not counted.
        source: where the model's authors say so.
    """

    name: str
    views: int
    per_view: int
    total: int
    source: str


_CLIP_L_336 = TokenSpec(576, 1024, (24, 24), 1)

RELEASED: dict[str, ReleasedModel] = {
    "LLaVA-1.5": ReleasedModel(_CLIP_L_336, "mlp", WholeImage(336), "https://arxiv.org/abs/2310.03744"),
    "LLaVA-NeXT": ReleasedModel(
        _CLIP_L_336, "mlp", AnyResTiler(), "https://llava-vl.github.io/blog/2024-01-30-llava-next/"
    ),
    "InternVL 1.5 to 3": ReleasedModel(
        TokenSpec(1024, 1024, (32, 32), 1),
        "pixel_shuffle:factor=2+mlp",
        InternVLTiler(),
        "https://arxiv.org/abs/2404.16821",
    ),
    "BLIP-2": ReleasedModel(
        TokenSpec(256, 1408, (16, 16), 1),
        "keep_prefix+qformer+linear",
        WholeImage(224),
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
        plan = model.tiler.plan(image_size)
        # The width of the LLM changes no count.
        out, _, _ = measure_connector(model.connector, model.tokens, 64)
        total = model.tiler.layout.num_tokens(plan, out)
        rows.append(ReleasedBudget(name, plan.num_views, out.num_tokens, total, model.source))
    return rows
