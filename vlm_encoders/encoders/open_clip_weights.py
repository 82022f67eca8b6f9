"""Weights of OpenCLIP's vision towers, read without the text tower and loaded strictly."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.encoders.open_clip_explain import architecture
from vlm_encoders.encoders.timm_filter import unfit
from vlm_encoders.encoders.timm_weights import check_architecture
from vlm_encoders.encoders.weight_files import OPEN_CLIP_NAMES, read_json
from vlm_encoders.encoders.weights import find_weights, load_state
from vlm_encoders.spec import EncoderSpec

__all__ = ["load_native", "read_visual"]

# What a whole model holds besides its vision tower.
_OTHERS = re.compile(
    r"(text|text_decoder|text_encoder)\..|transformer\.resblocks\.\d+\.|token_embedding\.weight$"
    r"|(ln_final|text_projection)\.(weight|bias)$|(positional_embedding|text_projection|logit_scale|logit_bias"
    r"|attn_mask|input_resolution|context_length|vocab_size)$"
)
_APPLE = "image_encoder."


def read_visual(spec: EncoderSpec, visual: Any, *, pretrained: bool | str) -> tuple[dict[str, Tensor], Path]:
    """Read the tensors of the vision tower, without the prefix `visual.`, and say where from.

    Args:
        spec: of the encoder.
        visual: OpenCLIP's tower, or what stands for it with its `trunk`; MobileCLIP's
            first checkpoints are renamed after it.
        pretrained: True for the spec's weights, or a local folder or file.

    Raises:
        VlmError: there are no weights, no vision tower among them, or keys of no part of a CLIP.
    """
    surprises: list[str] = []

    def wanted(key: str) -> bool:
        ours = key.startswith(("visual.", _APPLE))
        if not ours and not _OTHERS.match(key):
            surprises.append(key)
        # Apple's renaming asks for the scale too.
        return ours or key == "logit_scale"

    path = find_weights(
        spec.name, spec.weights, pretrained=pretrained, revision=spec.revision, names=OPEN_CLIP_NAMES, wanted=wanted
    )
    if isinstance(pretrained, str):
        _check_folder(spec, path)
    surprises.clear()
    state = load_state(path, spec.name, names=OPEN_CLIP_NAMES, wanted=wanted)
    if any(key.startswith(_APPLE) for key in state):
        from open_clip.convert import convert_state_dict

        state = convert_state_dict(SimpleNamespace(visual=visual), state)
    found = {key.removeprefix("visual."): tensor for key, tensor in state.items() if key.startswith("visual.")}
    if not found:
        raise VlmError(f"{spec.name}: weights in '{path}' hold no 'visual.' tower; give an OpenCLIP checkpoint")
    if surprises:
        _refuse(spec, path, [], surprises)
    return found, path


def load_native(visual: nn.Module, spec: EncoderSpec, *, pretrained: bool | str) -> None:
    """Load a tower of OpenCLIP's own, without what is behind the feature layer.

    Raises:
        VlmError: there are no weights, or they are not of this tower.
    """
    from open_clip.model import resize_pos_embed

    state, path = read_visual(spec, visual, pretrained=pretrained)
    table = state.get("positional_embedding")
    if table is not None:
        _check_table(spec, visual, table)
        whole: dict[str, Any] = {"visual.positional_embedding": table.float()}
        resize_pos_embed(whole, SimpleNamespace(visual=visual))
        state["positional_embedding"] = whole["visual.positional_embedding"]
    needed = visual.state_dict()
    leftover = re.compile(_behind(spec))
    missing = [key for key in needed if key not in state]
    unexpected = [key for key in state if key not in needed and not leftover.match(key)]
    if missing or unexpected:
        _refuse(spec, path, missing, unexpected)
    try:
        visual.load_state_dict({key: state[key] for key in needed})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise unfit(spec, reason) from error


def _check_folder(spec: EncoderSpec, path: Path) -> None:
    """Hold the configs beside the weights to the tower: other activations have weights of the same shapes."""
    config = architecture(spec.source, spec.name)
    trunk = config["vision_cfg"].get("timm_model_name")
    if trunk:
        check_architecture(spec, path, trunk)
    file = path / "open_clip_config.json"
    if trunk or not file.is_file():
        return
    told = read_json(file, spec.name, writer="open_clip's push_to_hf_hub").get("model_cfg", {}).get("quick_gelu")
    ours = bool(dict(spec.options).get("quick_gelu", config.get("quick_gelu", False)))
    if told is not None and bool(told) != ours:
        raise VlmError(
            f"{spec.name}: '{path}' holds weights with quick_gelu={told}, the tower has {ours}; pass quick_gelu={told}"
        )


def _check_table(spec: EncoderSpec, visual: Any, table: Tensor) -> None:
    """Let only the table of the spec's own size be resampled: any other is of another tower."""
    rows, columns = (side // step for side, step in zip(spec.native_size, visual.patch_size, strict=True))
    expected = (1 + rows * columns, visual.positional_embedding.shape[1])
    if tuple(table.shape) != expected:
        raise unfit(spec, f"positional_embedding is {tuple(table.shape)}, {spec.source} has {expected}")


def _behind(spec: EncoderSpec) -> str:
    """Give an expression of the keys of heads and of layers behind the last feature layer."""
    cut = "|".join(str(index) for index in range(spec.kept_layers, spec.num_layers)) or "(?!)"
    if spec.stages:
        return rf"attnpool\.|layer({cut})\."
    norm = "" if spec.final_norm else r"|ln_post\."
    return rf"proj$|attn_pool\.|attn_pool_contrastive\.|transformer\.resblocks\.({cut})\.{norm}"


def _refuse(spec: EncoderSpec, path: Path, missing: list[str], unexpected: list[str]) -> None:
    said = [
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    raise VlmError(
        f"{spec.name}: weights in '{path}' do not fit {spec.source}: {', '.join(said)}; "
        "give a checkpoint of this encoder"
    )
