"""Save and load a model by part: small, atomic, and never silently of another encoder.

A checkpoint folder holds `model.json` (what the parts are, with the SHA-256 of each),
`connector.safetensors`, and the weights of a part only where they are not those of its
source: `encoder.safetensors`, `llm/`, or `adapter/` (peft). A part that never trained is
built from its source again and held to its hash.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.errors import VlmError
from connectors.recipe import build_connector, recipe_of
from connectors.tokens import TokenSpec
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.vlm.atomic import atomic_folder, recover
from vlm_encoders.vlm.fingerprint import module_hash
from vlm_encoders.vlm.stages import PARTS, Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from vlm_encoders.encoder import Encoder

    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["load_model", "part_hashes", "save_model"]

FORMAT = 1
MANIFEST = "model.json"


def part_hashes(model: VisionLanguageModel) -> dict[Part, str]:
    """Give the SHA-256 of each part's tensors: names, dtypes, shapes and bytes."""
    return {part: module_hash(_tensors(model, part)) for part in PARTS}


def save_model(model: VisionLanguageModel, folder: Path) -> None:
    """Save a model to a folder; an existing checkpoint there is replaced only once the new one is whole.

    Args:
        model: the model.
        folder: the checkpoint's folder.

    Raises:
        VlmError: it cannot be written, or a connector has no registered name.
    """
    from safetensors.torch import save_file

    hashes = part_hashes(model)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "image_token_id": model.image_token_id,
        "layout": {"unpad": model.layout.unpad, "newline": model.layout.newline},
        "stage": model.stage.name if model.stage else None,
        "trained": sorted(model.trained),
        "encoder": {"origin": model.encoder.origin, "spec": model.encoder.spec.name, **_stored(model.encoder)},
        "connector": _connector_entry(model),
        "llm": {"source": _source(model.llm), "adapter": hasattr(model.llm, "peft_config"), **_stored(model.llm)},
    }
    for part in PARTS:
        manifest[part]["sha256"] = hashes[part]
    manifest["encoder"]["saved"] = "encoder" in model.trained or not _rebuilds(model.encoder.origin)
    manifest["llm"]["saved"] = "llm" in model.trained or not manifest["llm"]["source"]
    with atomic_folder(folder) as part_folder:
        save_file(_contiguous(_tensors(model, "connector")), part_folder / "connector.safetensors")
        if manifest["encoder"]["saved"]:
            save_file(_contiguous(_tensors(model, "encoder")), part_folder / "encoder.safetensors")
        if manifest["llm"]["adapter"]:
            model.llm.save_pretrained(part_folder / "adapter")  # type: ignore[operator]
        elif manifest["llm"]["saved"]:
            model.llm.save_pretrained(part_folder / "llm")  # type: ignore[operator]
        (part_folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load_model(
    folder: Path, *, encoder: Encoder | None = None, llm: nn.Module | str | None = None
) -> VisionLanguageModel:
    """Load a model that `save_model` wrote.

    Args:
        folder: the checkpoint's folder.
        encoder: the encoder to use; None builds the one of the checkpoint.
        llm: the LLM, or where it is now; None takes it from the checkpoint or its source.

    Raises:
        VlmError: the folder is no checkpoint, or a part is not the one that it was trained with.
    """
    from safetensors.torch import load_file

    from vlm_encoders.vlm.model import VisionLanguageModel

    recover(folder)
    manifest = _read_manifest(folder)
    encoder = encoder or _build_encoder(manifest["encoder"])
    in_spec = _spec_from(manifest["connector"]["in_spec"])
    if encoder.token_spec != in_spec:
        raise VlmError(
            f"checkpoint '{folder}' was made with '{manifest['encoder']['spec']}' ({_words(in_spec)}), the encoder "
            f"given is '{encoder.spec.name}' ({_words(encoder.token_spec)}); build the same one"
        )
    language_model = _build_llm(folder, manifest["llm"], llm)
    connector = build_connector(manifest["connector"]["recipe"], in_spec, manifest["connector"]["out_dim"])
    model = VisionLanguageModel(
        encoder,
        connector.to(_dtype(manifest["connector"]["dtype"])),
        language_model,
        image_token_id=manifest["image_token_id"],
        layout=TileLayout(**manifest["layout"]),
    )
    if manifest["encoder"]["saved"]:
        _fill(model, "encoder", load_file(folder / "encoder.safetensors"), folder)
    _fill(model, "connector", load_file(folder / "connector.safetensors"), folder)
    model.trained = set(manifest["trained"])
    _verify(model, manifest, folder)
    return model.eval()


def _verify(model: VisionLanguageModel, manifest: dict[str, Any], folder: Path) -> None:
    for part, digest in part_hashes(model).items():
        if digest != manifest[part]["sha256"]:
            origin = manifest["encoder"]["spec"] if part == "encoder" else manifest[part].get("source")
            raise VlmError(
                f"the {part} ('{origin}') is not the one that checkpoint '{folder}' was trained with: its weights have "
                f"SHA-256 {digest[:12]}, the checkpoint says {manifest[part]['sha256'][:12]}; load the same weights"
            )


def _build_encoder(entry: dict[str, Any]) -> Encoder:
    from vlm_encoders.registry import create_encoder

    if not entry["origin"]:
        raise VlmError(f"the encoder '{entry['spec']}' was not made by create_encoder; build it and pass encoder=")
    options = dict(entry["origin"])
    if entry["saved"]:
        # Its weights lie in the checkpoint: nothing is fetched.
        options["pretrained"] = False
    return create_encoder(**options).to(_dtype(entry["dtype"]))


def _build_llm(folder: Path, entry: dict[str, Any], llm: nn.Module | str | None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if llm is None or isinstance(llm, str):
        inside = folder / "llm"
        source = llm or (str(inside) if inside.is_dir() else entry["source"])
        try:
            llm = AutoModelForCausalLM.from_pretrained(source, dtype=_dtype(entry["dtype"]))
        except OSError as error:
            raise VlmError(
                f"the LLM '{source}' of checkpoint '{folder}' cannot be loaded; pass llm= with its place"
            ) from error
    if entry["adapter"]:
        from peft import PeftModel

        llm = PeftModel.from_pretrained(llm, folder / "adapter", is_trainable=True)
    loaded: nn.Module = llm
    return loaded


def _fill(model: VisionLanguageModel, part: Part, saved: dict[str, Tensor], folder: Path) -> None:
    import torch

    own = _tensors(model, part)
    wrong = sorted(own.keys() ^ saved.keys()) or [key for key in own if own[key].shape != saved[key].shape]
    if wrong:
        raise VlmError(
            f"the {part} of checkpoint '{folder}' does not fit: {', '.join(wrong[:4])} "
            f"({len(wrong)} in all) are missing, unexpected or of another shape; build the same {part}"
        )
    with torch.no_grad():
        for key, tensor in saved.items():
            own[key].copy_(tensor)


def _tensors(model: VisionLanguageModel, part: Part) -> dict[str, Tensor]:
    tensors = dict(model.part_module(part).state_dict())
    if part == "connector" and model.newline is not None:
        tensors["newline"] = model.newline.detach()
    return tensors


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _connector_entry(model: VisionLanguageModel) -> dict[str, Any]:
    spec = model.encoder.token_spec
    return {
        "recipe": recipe_of(model.connector, model.token_spec.dim),
        "in_spec": [spec.num_tokens, spec.dim, spec.grid, spec.num_prefix],
        "out_dim": model.token_spec.dim,
        **_stored(model.connector),
    }


def _stored(module: nn.Module) -> dict[str, str]:
    first = next(module.parameters(), None)
    return {"dtype": "float32" if first is None else str(first.dtype).removeprefix("torch.")}


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _source(llm: nn.Module) -> str:
    return str(getattr(llm.config, "_name_or_path", "") or "")


def _rebuilds(origin: dict[str, Any]) -> bool:
    return bool(origin) and origin["pretrained"] is not False


def _spec_from(entry: list[Any]) -> TokenSpec:
    num_tokens, dim, grid, num_prefix = entry
    return TokenSpec(num_tokens, dim, None if grid is None else (grid[0], grid[1]), num_prefix)


def _words(spec: TokenSpec) -> str:
    return f"{spec.num_tokens} tokens of width {spec.dim}"


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise VlmError(f"'{folder}' is no model checkpoint: {MANIFEST} is missing or broken") from error
    if manifest.get("format") != FORMAT:
        raise VlmError(
            f"checkpoint '{folder}' has format {manifest.get('format')}, this version reads {FORMAT}; "
            "update vlm-encoders"
        )
    return manifest
