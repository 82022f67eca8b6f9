"""The tensors of one part: hashed, written, and read back strictly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from connectors.errors import VlmError
from vlm_encoders.vlm.fingerprint import module_hash
from vlm_encoders.vlm.stages import PARTS, Part, has_adapter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["fill_part", "part_hashes", "save_adapter", "save_llm", "save_part"]


def part_hashes(model: VisionLanguageModel) -> dict[Part, str]:
    """Give the SHA-256 of each part's tensors: names, dtypes, shapes and bytes."""
    return {part: module_hash(_tensors(model, part)) for part in PARTS}


def save_part(model: VisionLanguageModel, part: Part, file: Path) -> None:
    """Write the tensors of a part to a safetensors file."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _tensors(model, part).items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses two names of one memory, such as tied weights.
        tensors[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    save_file(tensors, file)


def fill_part(model: VisionLanguageModel, part: Part, file: Path) -> None:
    """Put the tensors of a file into a part, in the dtype in which they were saved.

    Raises:
        VlmError: the file cannot be read, or has other keys or shapes than the part.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch import nn

    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise VlmError(f"'{file}' cannot be read ({error}); the checkpoint is broken, use an earlier one") from error
    if part == "connector" and model.connector.newline is None and "newline" in saved:
        # A layout without row ends makes none, but released weights had brought it.
        model.connector.newline = nn.Parameter(saved["newline"])
    own = _tensors(model, part)
    problems = {
        "missing": sorted(own.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - own.keys()),
        "of another shape": sorted(name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape),
    }
    if any(problems.values()):
        said = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in problems.items() if names)
        raise VlmError(f"'{file}' does not fit the {part}, {said}; build the {part} that it was saved from")
    for name, tensor in own.items():
        tensor.data = saved[name].to(tensor.device)


def save_llm(llm: nn.Module, folder: Path) -> None:
    """Write the LLM's own weights as transformers does, without adapters."""
    if not has_adapter(llm):
        llm.save_pretrained(folder)  # type: ignore[operator]
        return
    base = llm.get_base_model()  # type: ignore[operator]
    state = {
        name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items() if ".lora_" not in name
    }
    base.save_pretrained(folder, state_dict=state)


def save_adapter(llm: nn.Module, folder: Path) -> None:
    """Write the LLM's adapters as peft does."""
    # Asked for "auto", peft would look for the LLM's config on the hub.
    llm.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]


def _tensors(model: VisionLanguageModel, part: Part) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(model.part_module(part).state_dict(keep_vars=True))
    newline = model.connector.newline
    # A chain shares the newline of its link, which the recipe does not make again.
    twice = [name for name in tensors if newline is not None and name.endswith(".newline") and tensors[name] is newline]
    return {name: tensor for name, tensor in tensors.items() if name not in twice}
