"""What staged networks of transformers share: layers are stages, of their own widths and grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from connectors.errors import VlmError
from connectors.tokens import Grid, VisualTokens
from vlm_encoders.encoders.towers.base import Tower
from vlm_encoders.spec import EncoderSpec, Stage, as_size

__all__ = ["Staged", "stage_grid"]


class Staged(Tower):
    """A network of stages, each read before the step to the next.

    Attributes:
        depths: the config entry with the number of blocks of each stage.
        per_stage: further entries with a value for each stage, cut with the stages.
        rounding: as in `EncoderSpec`.
    """

    kinds = ()
    depths = "depths"
    per_stage: tuple[str, ...] = ()
    rounding = "floor"
    windowed = False

    def stages_of(self, config: Any) -> tuple[Stage, ...]:
        """Give the stages of a config, first to last."""
        raise NotImplementedError

    def ends(self, network: Any) -> Sequence[nn.Module]:
        """Give the module of each kept stage whose output is the stage's."""
        return self.blocks(network)

    def config_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give the size; the stages are options."""
        return {"image_size": self.side(spec)}

    def told(self, config: Any) -> tuple[str, ...]:
        """Leave all but the size to the options."""
        return ("image_size",)

    def cut(self, entries: dict[str, Any], spec: EncoderSpec) -> dict[str, Any]:
        """Keep the first stages alone, with the drop rates that their blocks had.

        Raises:
            VlmError: the last norm is asked for at another stage than the last.
        """
        if spec.final_norm and spec.layers != (-1,):
            raise VlmError(
                f"{spec.name}: its last norm is as wide as its last stage; "
                f"for stages {spec.layers} pass final_norm=False"
            )
        default = self.config_class()()
        whole = list(entries.get(self.depths, getattr(default, self.depths)))
        kept = spec.kept_layers
        names = (self.depths, *self.per_stage)
        short = {name: list(entries.get(name, getattr(default, name)))[:kept] for name in names}
        rate = entries.get("drop_path_rate", getattr(default, "drop_path_rate", 0.0))
        if rate and sum(whole) > 1:
            # Rates rise in equal steps up to that of the last block.
            short["drop_path_rate"] = rate * (sum(whole[:kept]) - 1) / (sum(whole) - 1)
        return {**entries, **short}

    def spec_of(self, config: Any, owner: str) -> dict[str, Any]:
        """Give the stages, and the entries that make them as options."""
        stages = self.stages_of(config)
        return {
            "family": self.family,
            "source": self.source,
            "stride": stages[-1].stride,
            "dim": stages[-1].dim,
            "block_dim": stages[0].dim,
            "stages": stages,
            "num_layers": len(stages),
            "feature_layer": self.feature_layer,
            "final_norm": self.final_norm,
            "trained_size": as_size(self.native_of(config), owner),
            "sizes": self.sizes,
            "packs": self.packs,
            "rounding": self.rounding,
            "positions": self.positions,
            "windowed": self.windowed,
            "options": self.options_of(config),
        }

    def native_of(self, config: Any) -> int | Grid:
        """Give the side or size that the config is made for, px."""
        size = config.image_size
        return size if isinstance(size, int) else (size[0], size[1])

    def options_of(self, config: Any) -> Any:
        """Give the entries that differ from the class's own."""
        from vlm_encoders.encoders.towers.entries import changed_entries

        return changed_entries(config, self.config_class()(), without=(*self.fixed, *self.told(config)))

    def behind(self, spec: EncoderSpec) -> str:
        """Give the cut stages, and the step behind the last kept one."""
        path = self.layers.replace(".", r"\.")
        cut = "|".join(str(index) for index in range(spec.kept_layers, spec.num_layers))
        step = rf"(.*\.)?{path}\.{spec.kept_layers - 1}\.downsample\."
        return rf"(.*\.)?{path}\.({cut})\.|{step}" if cut else r"(?!)"

    def watched(self, network: nn.Module, spec: EncoderSpec) -> dict[int, nn.Module]:
        """Give the ends of the feature layers' stages, but that which the network's last norm stands behind."""
        ends = self.ends(network)
        return {layer: ends[spec.num_layers + layer] for layer in spec.layers if not (spec.final_norm and layer == -1)}

    def run(self, network: nn.Module, pixels: Tensor, spec: EncoderSpec, kept: dict[int, Any]) -> dict[int, Tensor]:
        """Call the network once and give each feature layer's output, the last one normed where `spec` says so."""
        last = self.last_hidden(network, pixels, spec)
        found = {layer: self.output(returned) for layer, returned in kept.items()}
        kept.clear()
        if spec.final_norm:
            found[-1] = last
        return found

    def tokens(self, hidden: Tensor, spec: EncoderSpec, layer: int) -> VisualTokens:
        """Give row-major tokens of a stage's output (B, N, D)."""
        return VisualTokens(hidden, stage_grid(spec, layer))


def stage_grid(spec: EncoderSpec, layer: int) -> Grid:
    """Give (rows, columns) of the tokens of one stage, at the size of the views."""
    rows, columns = spec.at_layer(layer, final_norm=False).token_spec().grid or (0, 0)
    return rows, columns
