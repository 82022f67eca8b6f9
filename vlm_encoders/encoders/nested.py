"""Vision towers inside checkpoints of whole VLMs: whose class, which config, which keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.errors import VlmError
from vlm_encoders.encoders.nested_tables import (
    DEEPER,
    INTERN_ENTRIES,
    INTERN_KEYS,
    INTERN_SPLITS,
    LIKE_SIGLIP,
    LLAVA,
    LLAVA_PREFIX,
    PLACES,
    SIGLIP_ENTRIES,
)
from vlm_encoders.encoders.weight_files import Wanted
from vlm_encoders.encoders.weights import load_state, read_json, snapshot
from vlm_encoders.spec import Layers

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NestedTower", "find_tower", "load_nested"]

Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class NestedTower:
    """The vision tower of a whole VLM, as its class alone would see it.

    Attributes:
        model_type: of the tower's own config, which decides its class.
        config: the tower's own config, all entries.
        renames: regular expressions and what takes their place, in order; keys that the
            first does not match are not of the tower.
        splits: expressions of keys whose tensor holds several, and the names of these, in order.
        feature_layer: the layer that the VLM reads, before the final norm; None for the tower's own output.
        elsewhere: hub id of the tower where the checkpoint may leave its weights out.
        native: whether the class stands in for the VLM's own, with equal numbers at the native size alone.
        expand: whether the VLM fills images up to a square before it resizes them.
    """

    model_type: str
    config: dict[str, Any]
    renames: Renames
    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()
    feature_layer: Layers | None = None
    elsewhere: str | None = None
    native: bool = False
    expand: bool = False

    def rename(self, key: str) -> str | None:
        """Give the name of a checkpoint's key in the tower's class, or None if it is not of the tower."""
        if not self.renames or not re.match(self.renames[0][0], key):
            return None
        for pattern, goal in self.renames:
            key = re.sub(pattern, goal, key)
        return key

    def take(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the tower's tensors of a checkpoint under the names of the tower's class."""
        taken: dict[str, Tensor] = {}
        for key, tensor in state.items():
            name = self.rename(key)
            if name is not None:
                taken.update(self._parts(name, tensor))
        return taken

    def _parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        for pattern, goals in self.splits:
            found = re.fullmatch(pattern, name)
            if found is not None:
                return dict(zip([found.expand(goal) for goal in goals], tensor.chunk(len(goals)), strict=True))
        return {name: tensor}


def find_tower(raw: Mapping[str, Any], owner: str) -> NestedTower | None:
    """Find the vision tower of a whole VLM by its config.

    Args:
        raw: the content of the checkpoint's config.json; its `model_type` decides.
        owner: the encoder's name, for messages.

    Returns:
        The tower, or None where the config is of no VLM that we know.

    Raises:
        VlmError: the config of a known VLM is incomplete, or its tower's config is elsewhere and not to be had.
    """
    kind = raw.get("model_type", "")
    if not isinstance(kind, str):
        raise VlmError(f"{owner}: model_type {kind} of its config.json is no word; repair the file")
    if kind in LLAVA and "mm_vision_tower" in raw:
        return _of_llava(raw, owner)
    if kind in {"internvl_chat", "intern_vit_6b"}:
        return _of_intern(raw, owner)
    if kind == "sam2_hiera_det_model":
        return _of_trunk(raw, owner)
    if kind not in PLACES:
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        # The VLM's own config class fills in what its vision_config leaves out.
        config: Any = CONFIG_MAPPING[kind].from_dict(dict(raw))
        vision = attrgetter(DEEPER.get(kind, "vision_config"))(config).to_dict()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise VlmError(f"{owner}: transformers cannot read its {kind} config: {reason}; repair it") from error
    prefix = rf"^(model\.)?{PLACES[kind]}\.(vision_model\.)?"
    layer = _from_the_end(getattr(config, "vision_feature_layer", None), vision, owner)
    native = vision["model_type"] in LIKE_SIGLIP
    if native:
        vision = {**{entry: vision[entry] for entry in SIGLIP_ENTRIES}, "model_type": "siglip_vision_model"}
    return NestedTower(vision["model_type"], vision, ((prefix, ""),), feature_layer=layer, native=native)


def load_nested(path: Path, tower: NestedTower, owner: str, wanted: Wanted | None = None) -> dict[str, Tensor]:
    """Read the tower's tensors alone of a VLM's folder or file, under the names of the tower's class.

    Args:
        path: the folder or file.
        tower: what of it is the tower.
        owner: the encoder's name, for messages.
        wanted: which keys, by the names of the tower's class; None for all.

    Raises:
        VlmError: the files are broken, or hold nothing of the tower.
    """

    def inside(key: str) -> bool:
        name = tower.rename(key)
        return name is not None and (wanted is None or wanted(name))

    taken = tower.take(load_state(path, owner, wanted=inside))
    if not taken:
        instead = f"use 'hf:{tower.elsewhere}'" if tower.elsewhere else "give a checkpoint of the whole model"
        raise VlmError(f"{owner}: '{path}' holds no weights of its vision tower; {instead}")
    return taken


def _of_llava(raw: Mapping[str, Any], owner: str) -> NestedTower:
    """Read LLaVA's own checkpoints: they name the tower and say nothing else of it."""
    named = raw["mm_vision_tower"]
    if not isinstance(named, str):
        raise VlmError(f"{owner}: mm_vision_tower {named} of its config.json names no tower; write its hub id there")
    own = _of_table(named)
    if own is None:
        folder = Path(named).expanduser()
        folder = folder if folder.is_dir() else snapshot(named, owner, weights=False)
        config = read_json(folder / "config.json", owner)
        own = find_tower(config, owner) or NestedTower(config.get("model_type", ""), config, ())
    layer = _from_the_end(raw.get("mm_vision_select_layer"), own.config, owner)
    expand = raw.get("image_aspect_ratio") == "pad"
    return replace(own, renames=LLAVA_PREFIX, feature_layer=layer, elsewhere=named, expand=expand)


def _of_table(weights: str) -> NestedTower | None:
    """Read a tower's config off the row of the table that has these weights."""
    from vlm_encoders.encoders.transformers_load import require_tower, tower_config
    from vlm_encoders.registry import encoder_spec, list_encoders

    for spec in map(encoder_spec, list_encoders()):
        if spec.backend == "transformers" and spec.weights == weights:
            config = tower_config(require_tower(spec), spec.at_layer(-1, final_norm=False))
            return NestedTower(config.model_type, config.to_dict(), ())
    return None


def _of_intern(raw: Mapping[str, Any], owner: str) -> NestedTower:
    whole = raw["model_type"] == "internvl_chat"
    vision = (raw.get("vision_config") or {}) if whole else raw
    missing = [entry for entry in INTERN_ENTRIES if entry not in vision]
    if missing:
        raise VlmError(f"{owner}: its config of an InternViT has no {', '.join(missing)}; repair the file")
    config = {ours: vision[theirs] for theirs, ours in INTERN_ENTRIES.items()}
    prefix = r"^vision_model\." if whole else r"^(?=embeddings\.|encoder\.)"
    return NestedTower(
        "internvl_vision",
        {"model_type": "internvl_vision", **config},
        ((prefix, ""), *INTERN_KEYS),
        INTERN_SPLITS,
        _from_the_end(raw.get("select_layer"), config, owner),
    )


def _of_trunk(raw: Mapping[str, Any], owner: str) -> NestedTower:
    """Read SAM 2's trunk alone: the whole tower without the neck behind it."""
    channels = raw.get("embed_dim_per_stage")
    if not isinstance(channels, list | None):
        raise VlmError(f"{owner}: embed_dim_per_stage {channels} of its config.json is no list; repair the file")
    neck = {"backbone_channel_list": channels[::-1]} if channels else {}
    config = {"model_type": "sam2_vision_model", "backbone_config": dict(raw), **neck}
    return NestedTower("sam2_vision_model", config, ((r"^", "backbone."),), feature_layer=-1)


def _from_the_end(layers: Any, config: Mapping[str, Any], owner: str) -> Layers | None:
    """Count layers from the end: VLMs count a positive one from the embeddings, which are 0."""
    if layers is None:
        return None
    depth = config.get("num_hidden_layers", config.get("depth", 0))
    named = layers if isinstance(layers, (list, tuple)) else [layers]
    if not all(isinstance(number, int) for number in (depth, *named)):
        raise VlmError(f"{owner}: layer {layers!r} of {depth!r} in its config.json is no number; repair the file")
    several = [layer - depth - 1 if layer > 0 else layer for layer in named]
    return several[0] if len(several) == 1 else tuple(several)
