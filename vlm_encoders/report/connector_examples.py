"""One example of each connector: at its real size, and small enough to be drawn and tested."""

from __future__ import annotations

from dataclasses import dataclass

from connectors.base import CONNECTORS
from connectors.chain import Wrapper
from connectors.tokens import TokenSpec

__all__ = ["ENCODER", "EXAMPLES", "LLM_DIM", "VIEW", "Example", "connector_example"]

ENCODER = "clip-vit-l-14-336"
VIEW = TokenSpec(576, 1024, (24, 24), num_prefix=1)
"""A view of `ENCODER`."""
LLM_DIM = 4096
_SMALL = TokenSpec(36, 4, (6, 6), num_prefix=1)
_LARGER = TokenSpec(64, 4, (8, 8), num_prefix=1)


@dataclass(frozen=True)
class Example:
    """A connector in use.

    Attributes:
        recipe: from `tokens` to an LLM of width `LLM_DIM`.
        small: a recipe of the connector alone, for `small_tokens`.
        tokens: of one view.
        encoder: whose views are `tokens`, in words.
        small_tokens: few and narrow.
        marked: the token that a figure marks among those that go out; None for one in the middle.
        draws: random views over which a figure takes the mean.
    """

    recipe: str
    small: str
    tokens: TokenSpec = VIEW
    encoder: str = ENCODER
    small_tokens: TokenSpec = _SMALL
    marked: int | None = None
    draws: int = 64


EXAMPLES: dict[str, Example] = {
    "avg_pool": Example("avg_pool:factor=2+mlp", "avg_pool:factor=2"),
    "c_abstractor": Example("position+c_abstractor", "c_abstractor:grid=4x4,hidden=8,depth=1", small_tokens=_LARGER),
    "conv": Example("conv:dim=2048+linear", "conv"),
    "flamingo": Example("flamingo+linear", "flamingo:queries=4,depth=2,heads=2,head_dim=4"),
    "gated_mlp": Example("gated_mlp", "gated_mlp"),
    "instruct_qformer": Example(
        "keep_prefix+instruct_qformer+linear",
        "instruct_qformer:queries=4,dim=8,layers=2,heads=2,ffn=16,vocab=103,positions=2",
    ),
    "keep_prefix": Example("keep_prefix+mlp", "keep_prefix", marked=0),
    "ldp": Example("ldp", "ldp", small_tokens=_LARGER),
    "ldp_v2": Example("ldp_v2", "ldp_v2:grid=4x4", small_tokens=_LARGER),
    "linear": Example("linear", "linear"),
    "matryoshka": Example("mlp+matryoshka:levels=2/1/4/8/24", "matryoshka:levels=2/1/3"),
    "max_pool": Example("max_pool:factor=2+mlp", "max_pool:factor=2"),
    "mlp": Example("mlp", "mlp"),
    "norm": Example("norm+mlp", "norm"),
    "patch_merger": Example("patch_merger", "patch_merger"),
    "perceiver": Example("mlp+perceiver", "perceiver:queries=4,depth=2,heads=2,head_dim=4,kv_heads=1"),
    "pixel_shuffle": Example("pixel_shuffle:factor=2+mlp", "pixel_shuffle:factor=2"),
    "pooled_projector": Example("pooled_projector:grid=12x12", "pooled_projector:grid=3x3"),
    "position": Example("position+mlp", "position"),
    "qformer": Example("keep_prefix+qformer+linear", "qformer:queries=4,dim=8,layers=2,heads=2,ffn=16"),
    "residual": Example("residual(norm+mlp)+mlp", "residual(norm+conv:stride=1)"),
    "resize": Example("resize:grid=16x16+mlp", "resize:grid=4x4"),
    "sva": Example(
        "sva:widths=1024/1536,folds=1/2",
        "sva:widths=4/2,folds=1/2,hidden=8,heads=2,depth=1",
        tokens=TokenSpec(576, 7168, (24, 24)),
        encoder="fused[fold=true]:clip-vit-l-14-336+convnext-clip-l-256[image_size=1536]",
        small_tokens=TokenSpec(36, 12, (6, 6)),
    ),
    "token_packer": Example(
        "token_packer:levels=4",
        "token_packer:levels=2,hidden=8,heads=2",
        tokens=TokenSpec(576, 4096, (24, 24), num_prefix=1),
        encoder=f"{ENCODER} at layers -13, -9, -3 and -2",
    ),
    "tome": Example("tome:tokens=64+mlp", "tome:tokens=8", draws=1),
}
"""By name; a plugin's connector is shown with its own defaults."""


def connector_example(name: str) -> Example:
    """Give the example of a registered connector, plugins included.

    Raises:
        UnknownNameError: no connector has this name.
    """
    if name in EXAMPLES:
        return EXAMPLES[name]
    alone = f"{name}(mlp)" if issubclass(CONNECTORS.get(name), Wrapper) else name
    return Example(f"{alone}+linear", alone)
