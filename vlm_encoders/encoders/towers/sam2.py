"""SAM 2's image encoder by transformers: Hiera's stages, or one level of the pyramid behind them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from connectors.tokens import Grid, VisualTokens
from vlm_encoders.encoders.sam2 import POSITIONS
from vlm_encoders.encoders.towers.staged import Staged
from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["Sam2"]

_TRUNK = "backbone_config"


class Sam2(Staged):
    """Source: transformers' `Sam2VisionModel`.

    `final_norm` stands for the neck, a feature pyramid, read at its coarsest level that
    SAM 2 uses: the last stage but one (stride 16), brought to 256 channels by one
    convolution, plus the last stage, brought there by another and doubled in size. It is
    what SAM 2's memory and mask decoder take as the image. Finer levels are not built.

    Its windows and convolutions read whole maps, so that a pack is encoded size by size.
    """

    source = "Sam2VisionModel"
    config = "Sam2VisionConfig"
    family = "sam2"
    layers = "backbone.blocks"
    norm = "neck"
    dropped = r"(.*\.)?neck\."
    loose = ("backbone_feature_sizes", "image_size")
    positions = POSITIONS
    packs = True
    windowed = True
    bilinear = True

    def config_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give the neck's width."""
        return {"fpn_hidden_size": spec.neck.dim} if spec.neck else {}

    def cut(self, entries: dict[str, Any], spec: EncoderSpec) -> dict[str, Any]:
        """Keep the first stages of the trunk alone."""
        trunk = dict(entries.get(_TRUNK) or ())
        depths = trunk.get("blocks_per_stage", _default_trunk().blocks_per_stage)
        trunk |= {"model_type": "sam2_hiera_det_model", "blocks_per_stage": list(depths)[: spec.kept_layers]}
        return {**entries, _TRUNK: trunk}

    def told(self, config: Any) -> tuple[str, ...]:
        """Add the neck's width; sizes of maps change nothing."""
        return (*super().told(config), "fpn_hidden_size", "backbone_feature_sizes")

    def stages_of(self, config: Any) -> tuple[Stage, ...]:
        """Give stages that pool the grid as long as the config says."""
        trunk = config.backbone_config
        step = trunk.query_stride[0]
        return tuple(
            Stage(width, trunk.patch_stride[0] * step ** min(place, trunk.num_query_pool_stages))
            for place, width in enumerate(trunk.embed_dim_per_stage)
        )

    def native_of(self, config: Any) -> Grid:
        """Give the size that the trunk is made for."""
        size = config.backbone_config.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def spec_of(self, config: Any, owner: str) -> dict[str, Any]:
        """Give the stages and the neck."""
        fields = super().spec_of(config, owner)
        neck = Stage(config.fpn_hidden_size, fields["stages"][-2].stride)
        return fields | {"neck": neck, "dim": neck.dim, "stride": neck.stride}

    def behind(self, spec: EncoderSpec) -> str:
        """Give the cut blocks, which are counted through all stages."""
        depths = dict(dict(spec.options).get(_TRUNK, ())).get("blocks_per_stage", _default_trunk().blocks_per_stage)  # type: ignore[call-overload]
        cut = "|".join(str(index) for index in range(sum(depths[: spec.kept_layers]), sum(depths)))
        return rf"(.*\.)?blocks\.({cut})\." if cut else r"(?!)"

    def prepare(self, network: Any, spec: EncoderSpec) -> None:
        """Drop what the tokens do not need, and resample the table of places in float32 at each call.

        The table of 7x7 places is resampled at the native size too: as a parameter, the result would outgrow it
        a thousandfold.
        """
        super().prepare(network, spec)
        network.backbone._get_pos_embed = MethodType(_places, network.backbone)  # noqa: SLF001
        if spec.final_norm:
            neck = network.neck
            neck.convs = neck.convs[:2]
            finer = len(spec.stages) - 2
            neck.fpn_top_down_levels = [level - finer for level in neck.fpn_top_down_levels]

    def blocks(self, network: Any) -> list[nn.Module]:
        """Give the blocks of each stage."""
        blocks = network.backbone.blocks
        ends = [0, *accumulate(network.config.backbone_config.blocks_per_stage)]
        return [nn.ModuleList(blocks[start:end]) for start, end in pairwise(ends)]

    def ends(self, network: Any) -> Sequence[nn.Module]:
        """Give the last block of each stage."""
        return [network.backbone.blocks[end] for end in network.backbone.stage_ends]

    def last_hidden(self, network: Any, pixels: Tensor, spec: EncoderSpec) -> Tensor:
        """Give the neck's map where it is asked for."""
        outputs = network.backbone(pixels)
        last: Tensor = outputs.last_hidden_state
        if not spec.final_norm:
            return last
        levels: Tensor = network.neck(outputs.intermediate_hidden_states[-2:])[0]
        return levels[1]

    def tokens(self, hidden: Tensor, spec: EncoderSpec, layer: int) -> VisualTokens:
        """Give tokens of the neck's map (B, D, R, C), or of a stage's (B, R, C, D)."""
        if spec.final_norm:
            return VisualTokens.from_map(hidden)
        return VisualTokens(hidden.flatten(1, 2), (hidden.shape[1], hidden.shape[2]))


def _places(trunk: Any, grid: Grid) -> Tensor:
    """Stand in for `_get_pos_embed`, which resamples in the dtype of the parameters."""
    table = interpolate(trunk.pos_embed.float(), size=tuple(grid), mode="bicubic").to(trunk.pos_embed.dtype)
    window = trunk.pos_embed_window
    repeats = [whole // part for whole, part in zip(table.shape, window.shape, strict=True)]
    places: Tensor = (table + window.tile(repeats)).permute(0, 2, 3, 1)
    return places


def _default_trunk() -> Any:
    from transformers import Sam2HieraDetConfig

    return Sam2HieraDetConfig()
