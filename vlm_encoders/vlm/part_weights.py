"""The tensors of one part: hashed, written, and read back strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.errors import VlmError
from vlm_encoders.vlm.blocks import is_adapter, plain_name
from vlm_encoders.vlm.fingerprint import module_hash
from vlm_encoders.vlm.stages import PARTS, Part, has_adapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = [
    "adapter_tensors",
    "built_dtype",
    "fill_part",
    "part_hashes",
    "part_tensors",
    "read_tensors",
    "save_adapter",
    "save_llm",
    "save_tensors",
]


def part_hashes(model: VisionLanguageModel) -> dict[Part, str]:
    """Give the SHA-256 of each part's tensors as they are saved: names, dtypes, shapes and bytes."""
    return {part: module_hash(part_tensors(model, part)) for part in PARTS}


def part_tensors(model: VisionLanguageModel, part: Part) -> dict[str, Tensor]:
    """Give a part's tensors by their names in the part, in the dtypes in which the part was built.

    Master weights, which are float32, are rounded to them; tensors that are tied stay one tensor.
    """
    rounded: dict[int, Tensor] = {}
    tensors = _own_tensors(model, part)
    for name, tensor in tensors.items():
        built = built_dtype(model, f"{part}.{name}")
        if built is not None and built != tensor.dtype:
            if id(tensor) not in rounded:
                # On the device there may be no room for a second copy of all weights.
                rounded[id(tensor)] = tensor.detach().to("cpu", built)
            tensors[name] = rounded[id(tensor)]
    return tensors


def adapter_tensors(model: VisionLanguageModel, part: Part) -> dict[str, Tensor]:
    """Give the tensors of the adapters inside a part, by their names in the part."""
    return {name: tensor for name, tensor in _own_tensors(model, part).items() if is_adapter(name)}


def built_dtype(model: VisionLanguageModel, name: str) -> torch.dtype | None:
    """Give the dtype that a parameter had before it became a float32 master; None where it is none."""
    return model.master_of.get(plain_name(name)) if model.master_of else None


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors to a safetensors file."""
    from safetensors.torch import save_file

    written: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses two names of one memory, such as tied weights.
        written[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    save_file(written, file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file of a checkpoint.

    Raises:
        VlmError: it is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise VlmError(f"'{file}' cannot be read ({error}); the checkpoint is broken, use an earlier one") from error
    return tensors


def fill_part(model: VisionLanguageModel, part: Part, file: Path, *, adapters: bool = False) -> None:
    """Put the tensors of a file into a part, or into its adapters alone, in the dtype in which they were saved.

    Raises:
        VlmError: the file cannot be read, or has other keys or shapes than the part.
    """
    from torch import nn

    saved = read_tensors(file)
    if part == "connector" and model.connector.newline is None and "newline" in saved:
        # A layout without row ends makes none, but released weights had brought it.
        model.connector.newline = nn.Parameter(saved["newline"])
    own = adapter_tensors(model, part) if adapters else _own_tensors(model, part)
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


def save_llm(model: VisionLanguageModel, folder: Path) -> None:
    """Write the LLM's own weights as transformers does, without adapters, in the dtype in which it was built."""
    llm: Any = model.llm
    base = llm.get_base_model() if has_adapter(llm) else llm
    if base is llm and not model.master_of:
        base.save_pretrained(folder)
        return
    tensors = part_tensors(model, "llm").items()
    state = {plain_name(f"llm.{name}").removeprefix("llm."): each for name, each in tensors if not is_adapter(name)}
    kind = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    base.save_pretrained(folder, state_dict=state)
    # transformers notes the dtype of the weights that the model holds, not of those that it writes.
    base.config.dtype = str(kind).removeprefix("torch.")
    base.config.save_pretrained(folder)


def save_adapter(llm: nn.Module, folder: Path) -> None:
    """Write the LLM's adapters as peft does."""
    # Asked for "auto", peft would look for the LLM's config on the hub.
    llm.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]


def _own_tensors(model: VisionLanguageModel, part: Part) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(model.part_module(part).state_dict(keep_vars=True))
    newline = model.connector.newline
    # A chain shares the newline of its link, which the recipe does not make again.
    twice = [name for name in tensors if newline is not None and name.endswith(".newline") and tensors[name] is newline]
    return {name: tensor for name, tensor in tensors.items() if name not in twice}
