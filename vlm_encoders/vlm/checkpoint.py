"""Save and load a model by part: small, atomic, and never silently of another encoder.

A checkpoint folder holds `model.json` (what the parts are, with the SHA-256 of each),
`connector.safetensors`, and the weights of a part only where they are not those of its
source: `encoder.safetensors`, `llm/`, or `adapter/` (peft); or, where it is asked for, the
trained tensors alone, `llm.trained.safetensors`. A part that never trained is built from its
source again and held to its hash.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.errors import VlmError
from connectors.recipe import build_connector
from connectors.tokens import TokenSpec
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.vlm.adapters import inject_saved
from vlm_encoders.vlm.atomic import atomic_folder, recover
from vlm_encoders.vlm.manifest import (
    MANIFEST,
    describe_checkpoint,
    pixel_rules,
    read_manifest,
    saved_spec,
    write_manifest,
)
from vlm_encoders.vlm.part_weights import (
    adapter_tensors,
    fill_part,
    part_hashes,
    part_tensors,
    save_adapter,
    save_llm,
    save_tensors,
)
from vlm_encoders.vlm.partial_weights import TRAINED_FILE, note_loaded, overlay_part, partial_tensors
from vlm_encoders.vlm.quantize import quantization_options
from vlm_encoders.vlm.stages import PARTS, Part, has_adapter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from connectors.base import Connector
    from vlm_encoders.encoder import Encoder
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["load_model", "part_hashes", "save_model"]

_PROCESSOR = "processor"
_ENCODER_ADAPTERS = "encoder.adapters.safetensors"
_WITH_SOURCE: tuple[Part, ...] = ("encoder", "llm")
_OWN = {MANIFEST, "connector.safetensors", "encoder.safetensors", _ENCODER_ADAPTERS, "llm", "adapter", _PROCESSOR}
_OWN |= {TRAINED_FILE.format(part=part) for part in _WITH_SOURCE}


def save_model(model: VisionLanguageModel, folder: Path, *, partial: bool = False) -> None:
    """Save a model to a folder; an existing checkpoint there is replaced only once the new one is whole.

    A processor that was saved into the folder stays.

    Args:
        model: the model.
        folder: the checkpoint's folder: new, empty, or an earlier checkpoint.
        partial: of encoder and LLM, where a stage has trained some tensors and their source is still there, save
            these tensors alone; such a checkpoint is loaded only while the source is there.

    Raises:
        VlmError: it cannot be written, or the folder holds other things.
    """
    _refuse_other_contents(folder)
    manifest = describe_checkpoint(model)
    over_source = partial_tensors(model, manifest) if partial else {}
    for part in over_source:
        manifest[part] |= {"saved": False, "partial": True}
    for part, digest in part_hashes(model).items():
        manifest[part]["sha256"] = digest
    with atomic_folder(folder) as inside:
        save_tensors(part_tensors(model, "connector"), inside / "connector.safetensors")
        if manifest["encoder"]["saved"]:
            save_tensors(part_tensors(model, "encoder"), inside / "encoder.safetensors")
        elif "encoder" not in over_source and _has_adapters(manifest, "encoder"):
            save_tensors(adapter_tensors(model, "encoder"), inside / _ENCODER_ADAPTERS)
        if manifest["llm"]["saved"]:
            save_llm(model, inside / "llm")
        for part, tensors in over_source.items():
            save_tensors(tensors, inside / TRAINED_FILE.format(part=part))
        if manifest["llm"]["adapter"]:
            save_adapter(model.llm, inside / "adapter")
        if (folder / _PROCESSOR).is_dir():
            shutil.copytree(folder / _PROCESSOR, inside / _PROCESSOR)
        write_manifest(inside, manifest)


def load_model(
    folder: Path,
    *,
    encoder: Encoder | None = None,
    connector: Connector | None = None,
    llm: nn.Module | str | None = None,
) -> VisionLanguageModel:
    """Load a model that `save_model` wrote, in eval mode.

    Args:
        folder: the checkpoint's folder.
        encoder: the encoder to use; None builds the one of the checkpoint.
        connector: a connector of a class that has no registered name; None builds the recipe.
        llm: the LLM, or where it is now; None takes it from the checkpoint or its source.

    Raises:
        VlmError: the folder is no checkpoint, or a part is not the one that it was trained with.
    """
    from vlm_encoders.vlm.model import VisionLanguageModel

    recover(folder)
    manifest = read_manifest(folder)
    encoder = encoder or _build_encoder(folder, manifest["encoder"])
    in_spec = saved_spec(manifest["connector"]["in_spec"])
    if encoder.token_spec != in_spec:
        raise VlmError(
            f"checkpoint '{folder}' was made with encoder '{manifest['encoder']['name']}' ({_words(in_spec)}), the "
            f"encoder given is '{encoder.spec.name}' ({_words(encoder.token_spec)}); build the same one"
        )
    for rule, value in pixel_rules(encoder.spec).items():
        trained = manifest["encoder"]["pixels"][rule]
        if value != trained:
            raise VlmError(
                f"checkpoint '{folder}' was trained on pixels with {rule} {trained}, the encoder "
                f"'{encoder.spec.name}' has {value}; build it as it was"
            )
    layout = TileLayout.from_config(manifest["layout"])
    model = VisionLanguageModel(
        encoder,
        connector or _build_connector(folder, manifest["connector"], layout.connector_spec(in_spec)),
        _build_llm(folder, manifest["llm"], llm),
        image_token_id=manifest["image_token_id"],
        layout=layout,
    )
    inject_saved(model, manifest.get("adapters", {}))
    if manifest["encoder"]["saved"]:
        fill_part(model, "encoder", folder / "encoder.safetensors")
    elif not manifest["encoder"].get("partial") and _has_adapters(manifest, "encoder"):
        fill_part(model, "encoder", folder / _ENCODER_ADAPTERS, adapters=True)
    fill_part(model, "connector", folder / "connector.safetensors")
    for part in _WITH_SOURCE:
        if manifest[part].get("partial"):
            overlay_part(model, part, folder / TRAINED_FILE.format(part=part))
        elif manifest[part]["saved"]:
            note_loaded(model, part)
    # What has no source of its own but a checkpoint must be saved again with the next one.
    model.trained = {*manifest["trained"], *(part for part in PARTS if manifest[part].get("saved"))}
    _verify(model, manifest, folder)
    return model.eval()


def _has_adapters(manifest: dict[str, Any], part: Part) -> bool:
    return any(path.split(".")[0] == part for path in manifest.get("adapters", {}))


def _refuse_other_contents(folder: Path) -> None:
    others = sorted(path.name for path in folder.iterdir() if path.name not in _OWN) if folder.is_dir() else []
    if others:
        raise VlmError(
            f"'{folder}' holds {len(others)} things that are no part of a checkpoint, such as '{others[0]}', and a "
            "checkpoint replaces its whole folder; save to a new one"
        )


def _verify(model: VisionLanguageModel, manifest: dict[str, Any], folder: Path) -> None:
    for part, digest in part_hashes(model).items():
        wanted = manifest[part]["sha256"]
        if digest != wanted:
            raise VlmError(
                f"the {part} '{manifest[part]['name']}' is not the one that checkpoint '{folder}' was saved with: its "
                f"weights have SHA-256 {digest[:12]}, the checkpoint says {wanted[:12]}; load the same weights"
            )


def _build_encoder(folder: Path, entry: dict[str, Any]) -> Encoder:
    from vlm_encoders.registry import create_encoder

    if not entry["origin"]:
        raise VlmError(f"the encoder '{entry['name']}' was not made by create_encoder; build it and pass encoder=")
    options = dict(entry["origin"])
    if entry["saved"]:
        # Its weights lie in the checkpoint: nothing is fetched.
        options["pretrained"] = False
    try:
        encoder = create_encoder(**options)
    except VlmError as error:
        raise VlmError(f"the encoder of checkpoint '{folder}' cannot be built: {error}; or pass encoder=") from error
    # Casting for nothing would round the buffers that the library keeps in float32.
    return encoder if options["dtype"] == entry["dtype"] else encoder.to(_dtype(entry["dtype"]))


def _build_connector(folder: Path, entry: dict[str, Any], in_spec: TokenSpec) -> Connector:
    if entry["recipe"] is None:
        raise VlmError(
            f"the connector of checkpoint '{folder}' is a '{entry['name']}' without a registered name; build it and "
            "pass connector=, or decorate its class with @register_connector"
        )
    chain = build_connector(entry["recipe"], in_spec, entry["out_dim"], seed=None)
    return chain if entry["chain"] else chain.connectors[0]


def _build_llm(folder: Path, entry: dict[str, Any], llm: nn.Module | str | None) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if llm is None or isinstance(llm, str):
        source = llm or (str(folder / "llm") if entry["saved"] else entry["source"])
        try:
            kind = _dtype(entry["dtype"])
            options = quantization_options(entry.get("quantize", "no"), kind)
            llm = AutoModelForCausalLM.from_pretrained(source, dtype=kind, **options)
        except (OSError, ValueError, SafetensorError) as error:
            raise VlmError(
                f"the LLM '{source}' of checkpoint '{folder}' cannot be loaded; pass llm= with the place "
                "where it is now"
            ) from error
    loaded: nn.Module = llm  # type: ignore[assignment]
    if entry["adapter"] and not has_adapter(loaded):
        from peft import PeftModel

        try:
            loaded = PeftModel.from_pretrained(loaded, folder / "adapter", is_trainable=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise VlmError(
                f"the adapter of checkpoint '{folder}' is missing or broken ({error}); use an earlier one"
            ) from error
    return loaded


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _words(spec: TokenSpec) -> str:
    return f"{spec.num_tokens} tokens of width {spec.dim}"
