"""How a vision class of transformers is built, cut and read: ViT's way, unless a subclass says otherwise."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn

from connectors.errors import VlmError
from connectors.tokens import PackedTokens, VisualTokens
from vlm_encoders.encoders.pack_views import Places, by_size, join_sizes
from vlm_encoders.encoders.towers.entries import changed_entries
from vlm_encoders.encoders.towers.positions import resample_positions
from vlm_encoders.resample import join_channels
from vlm_encoders.spec import EncoderSpec, PrefixKind, Resize, Triple, as_size

__all__ = ["Tower"]


class Tower:
    """How one vision class of transformers is built, cut and read.

    Subclasses override what differs from a plain ViT; instances hold no state.

    Attributes:
        source: the class's name, as in `EncoderSpec.source`.
        config: the name of its config class.
        module: where both are, where not at transformers' top level.
        family: as in `EncoderSpec`.
        arguments: of the class's constructor, such as the one that leaves a pooler out.
        fixed: config entries that leave heads out; never compared with a checkpoint's.
        loose: further entries on which a checkpoint's config may differ from the encoder's.
        layers: dotted path of the list of blocks or stages.
        norm: dotted path of the last norm; "" where there is none.
        norm_inside: whether `last_hidden_state` is behind that norm.
        idle: dotted paths of parameters and modules on which no token depends.
        dropped: regular expression of keys of whole checkpoints that the tower has no use for.
        tables: dotted path of the module whose `interpolate_pos_encoding` works in the
            parameters' dtype, so that its table is resampled once; "" where there is none.
        asked: whether `interpolate_pos_encoding=True` must be passed off the native size.
        positions: as in `EncoderSpec`.
        kinds: of the prefix tokens.
        sizes: as in `EncoderSpec`.
        packs: as in `EncoderSpec`.
        feature_layer: where nobody says otherwise.
        final_norm: where nobody says otherwise.
        mean: where no preprocessor says otherwise.
        std: where no preprocessor says otherwise.
        resize: where no preprocessor says otherwise.
        free: whether the sizes in a preprocessor are bounds of an image's area, and no view's.
        bilinear: whether a resize is bilinear where no preprocessor says otherwise.
    """

    source = ""
    config = ""
    module = "transformers"
    family = ""
    arguments: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}
    loose: tuple[str, ...] = ()
    layers = "layers"
    norm = "layernorm"
    norm_inside = True
    idle: tuple[str, ...] = ()
    dropped = r"(?!)"
    tables = ""
    asked = False
    positions = "a learned table, resampled bicubically in float32 without antialiasing"
    kinds: tuple[PrefixKind, ...] = ("cls",)
    sizes: Literal["any", "square", "native"] = "any"
    packs = False
    feature_layer = -1
    final_norm = True
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)
    resize: Resize = "squash"
    free = False
    bilinear = False

    def network_class(self) -> Any:
        """Give the class of transformers."""
        return getattr(importlib.import_module(self.module), self.source)

    def config_class(self) -> Any:
        """Give its config class."""
        return getattr(importlib.import_module(self.module), self.config)

    def config_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give the config entries of `spec`, with the kept layers alone and without its options."""
        return {
            "hidden_size": spec.width,
            "num_hidden_layers": spec.kept_layers,
            "num_attention_heads": spec.heads,
            "patch_size": spec.stride,
            "image_size": self.side(spec),
            **self.mlp_of(spec),
        }

    def cut(self, entries: dict[str, Any], spec: EncoderSpec) -> dict[str, Any]:
        """Give the config's entries, options among them, as the kept layers need them."""
        return entries

    def mlp_of(self, spec: EncoderSpec) -> dict[str, Any]:
        """Give the config entries of the blocks' MLP."""
        return {"intermediate_size": spec.mlp_dim}

    def side(self, spec: EncoderSpec) -> int:
        """Give the side that the position table is built for, px.

        Raises:
            VlmError: it is not square.
        """
        height, width = spec.native_size
        if height != width:
            raise VlmError(
                f"{spec.name}: transformers builds it for square views alone, got {height}x{width}; use a side"
            )
        return height

    def spec_of(self, config: Any, owner: str) -> dict[str, Any]:
        """Give the `EncoderSpec` fields that `config` tells; `owner` is named in messages."""
        kinds = self.prefix_of(config)
        return {
            "family": self.family,
            "source": self.source,
            "stride": config.patch_size,
            "dim": config.hidden_size,
            "heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "num_prefix": len(kinds),
            "prefix_kinds": kinds,
            "feature_layer": self.feature_layer,
            "final_norm": self.final_norm,
            "trained_size": as_size(config.image_size, owner),
            "sizes": self.sizes,
            "packs": self.packs,
            "positions": self.positions,
            "options": changed_entries(config, self.config_class()(), without=(*self.fixed, *self.told(config))),
            **self.mlp_spec(config),
        }

    def prefix_of(self, config: Any) -> tuple[PrefixKind, ...]:
        """Give the kinds of the prefix tokens, in order."""
        return self.kinds

    def mlp_spec(self, config: Any) -> dict[str, Any]:
        """Give `mlp_dim` and `gated_mlp`; no `mlp_dim` where attention or MLP is not plain."""
        return {"mlp_dim": config.intermediate_size}

    def told(self, config: Any) -> tuple[str, ...]:
        """Name the config entries that other `EncoderSpec` fields tell, so that they are no options."""
        shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
        return (*shape, "intermediate_size")

    def leftover(self, spec: EncoderSpec) -> str:
        """Give a regular expression of checkpoint keys that may be left over: heads and cut layers."""
        return f"{self.dropped}|{self.behind(spec)}"

    def behind(self, spec: EncoderSpec) -> str:
        """Give a regular expression of the checkpoint keys of cut layers, which are not read at all."""
        cut = "|".join(str(index) for index in range(spec.kept_layers, spec.num_layers))
        return rf"(.*\.)?layers?\.({cut})\." if cut else r"(?!)"

    def prepare(self, network: nn.Module, spec: EncoderSpec) -> None:
        """Drop what no token depends on, and bring position tables to the size of a view.

        Raises:
            VlmError: a final norm is asked for and there is none.
        """
        for path in self.idle:
            _put(network, path, None)
        norm = attrgetter(self.norm)(network) if self.norm else nn.Identity()
        if spec.final_norm and isinstance(norm, nn.Identity):
            raise VlmError(f"{spec.name}: {self.source} has no final norm on its tokens; pass final_norm=False")
        if not spec.final_norm and self.norm:
            _put(network, self.norm, nn.Identity())
        if self.resamples(spec):
            self.resample(network, spec)

    def resamples(self, spec: EncoderSpec) -> bool:
        """Whether `prepare` resamples a position table, which is to be in float32 then."""
        return bool(self.tables) and spec.image_size != spec.native_size

    def resample(self, network: nn.Module, spec: EncoderSpec) -> None:
        """Bring the position table to the size of a view, by the library's own method."""
        resample_positions(attrgetter(self.tables)(network), spec)

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """Give the kept layers, first to last."""
        return list(attrgetter(self.layers)(network))

    def watched(self, network: nn.Module, spec: EncoderSpec) -> dict[int, nn.Module]:
        """Give the modules whose outputs are feature layers that the network itself does not give."""
        blocks, last = self.blocks(network), max(spec.layers)
        return {layer: blocks[layer - last - 1] for layer in spec.layers if layer != last}

    def forward(self, network: nn.Module, pixels: Tensor, spec: EncoderSpec, kept: dict[int, Any]) -> VisualTokens:
        """Map pixels (B, 3, H, W) to the tokens of the feature layers, joined where they are several."""
        outputs = self.run(network, pixels, spec, kept)
        parts = [self.tokens(outputs[layer], spec, layer) for layer in spec.layers]
        return parts[0] if len(parts) == 1 else join_channels(parts)

    def packs_here(self, spec: EncoderSpec) -> bool:
        """Whether views of many sizes can be packed with the options of `spec`."""
        return spec.packs

    def packed(
        self, network: nn.Module, views: Sequence[Tensor], spec: EncoderSpec, kept: dict[int, Any], places: Places
    ) -> PackedTokens:
        """Map views (3, H, W) of many sizes to packed tokens; here those of one size together.

        Args:
            network: as `prepare` left it.
            views: pixels of each.
            spec: the encoder's; sizes are those of the views.
            kept: where the hooks on the `watched` modules put what these return.
            places: of the tokens of each view that are encoded; None for all.

        Raises:
            VlmError: tokens are to be dropped, and the network needs whole maps.
        """
        groups = (
            (indices, self.forward(network, pixels, spec.resized((pixels.shape[2], pixels.shape[3])), kept))
            for indices, pixels in by_size(views)
        )
        return join_sizes(groups, places, spec.name)

    def run(self, network: nn.Module, pixels: Tensor, spec: EncoderSpec, kept: dict[int, Any]) -> dict[int, Tensor]:
        """Call the network once and give each feature layer's output, normed where `spec` says so.

        Args:
            network: as `prepare` left it.
            pixels: (B, 3, H, W).
            spec: the encoder's.
            kept: where the hooks on the `watched` modules put what these return; it is emptied.
        """
        return self.collect(network, self.last_hidden(network, pixels, spec), spec, kept)

    def collect(self, network: nn.Module, hidden: Tensor, spec: EncoderSpec, kept: dict[int, Any]) -> dict[int, Tensor]:
        """Give each feature layer's output of a network that has run, normed where `spec` says so.

        Args:
            network: as `prepare` left it.
            hidden: what the network gave of its last kept layer.
            spec: the encoder's.
            kept: what the hooks on the `watched` modules kept; it is emptied.
        """
        found = {layer: self.output(returned) for layer, returned in kept.items()}
        kept.clear()
        if spec.final_norm:
            norm = attrgetter(self.norm)(network) if self.norm else nn.Identity()
            found = {layer: norm(output) for layer, output in found.items()}
            hidden = hidden if self.norm_inside else norm(hidden)
        found[max(spec.layers)] = hidden
        return found

    def last_hidden(self, network: nn.Module, pixels: Tensor, spec: EncoderSpec) -> Tensor:
        """Call the network and give what it says of its last kept layer."""
        options = {"interpolate_pos_encoding": True} if self.asked and spec.image_size != spec.native_size else {}
        hidden: Tensor = network(pixels, **options).last_hidden_state
        return hidden

    def output(self, returned: Any) -> Tensor:
        """Give the hidden state in what a layer returns."""
        hidden: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return hidden

    def tokens(self, hidden: Tensor, spec: EncoderSpec, layer: int) -> VisualTokens:
        """Give row-major tokens of a layer's output (B, P + N, D), the prefix apart."""
        count = spec.num_prefix
        return VisualTokens(hidden[:, count:], spec.token_spec().grid, hidden[:, :count] if count else None)


def _put(network: nn.Module, path: str, value: nn.Module | None) -> None:
    """Set an attribute at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, value)
