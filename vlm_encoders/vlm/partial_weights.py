"""Of a part that trained in part, the trained tensors alone: the source of the others is still there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.errors import VlmError
from vlm_encoders.encoders.joint_name import map_places
from vlm_encoders.vlm.blocks import is_adapter, plain_name
from vlm_encoders.vlm.part_weights import part_tensors, read_tensors
from vlm_encoders.vlm.policy import Part

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["TRAINED_FILE", "note_loaded", "overlay_part", "partial_tensors"]

TRAINED_FILE = "{part}.trained.safetensors"
_OVER_SOURCE: tuple[Part, ...] = ("encoder", "llm")


def partial_tensors(model: VisionLanguageModel, manifest: dict[str, Any]) -> dict[Part, dict[str, Tensor]]:
    """Give the tensors to lay over the source, for each part that need not be saved whole.

    Args:
        model: the model.
        manifest: of the model, which says of each part whether it is saved whole otherwise.
    """
    found = {}
    for part in _OVER_SOURCE:
        if manifest[part]["saved"] and _source_is_there(part, manifest[part]) and not _merged(model, part, manifest):
            tensors = _trained_tensors(model, part, manifest[part]["dtype"])
            if tensors is not None:
                found[part] = tensors
    return found


def overlay_part(model: VisionLanguageModel, part: Part, file: Path) -> None:
    """Put the trained tensors of a file over those of the part's source.

    Raises:
        VlmError: the file cannot be read, or holds what the part does not have.
    """
    saved = read_tensors(file)
    own = {_plain(part, name): tensor for name, tensor in part_tensors(model, part).items()}
    wrong = [name for name in saved if name not in own or own[name].shape != saved[name].shape]
    if wrong:
        raise VlmError(
            f"'{file}' does not fit the {part}: {len(wrong)} of its {len(saved)} tensors are unexpected or of another "
            f"shape, '{wrong[0]}' first; build the {part} that it was saved from"
        )
    for name, tensor in saved.items():
        own[name].data = tensor.to(own[name].device)
    model.trained_names |= {f"{part}.{name}" for name in saved if not is_adapter(name)}


def note_loaded(model: VisionLanguageModel, part: Part) -> None:
    """Remember that no tensor of a part is known to be that of its source, as it was saved whole."""
    model.trained_names |= {plain_name(name) for name, _ in model.part_parameters(part) if not is_adapter(name)}


def _trained_tensors(model: VisionLanguageModel, part: Part, dtype: str) -> dict[str, Tensor] | None:
    """Give the tensors that may not be those of the source; None where the source would not give the others."""
    parameters = {_plain(part, name.removeprefix(f"{part}.")) for name, _ in model.part_parameters(part)}
    chosen: dict[str, Tensor] = {}
    left = 0
    for raw, tensor in part_tensors(model, part).items():
        name = _plain(part, raw)
        if is_adapter(name):
            # Those of the LLM have a folder of their own.
            if part == "encoder":
                chosen[name] = tensor
        elif name not in parameters or f"{part}.{name}" in model.trained_names:
            # Buffers are few, and batch norms write to them.
            chosen[name] = tensor
        elif tensor.is_floating_point() and str(tensor.dtype).removeprefix("torch.") != dtype:
            # The source is built in one dtype.
            return None
        else:
            left += 1
    return chosen if left else None


def _source_is_there(part: Part, entry: dict[str, Any]) -> bool:
    if part == "llm":
        return bool(entry["source"]) and _is_place(entry["source"])
    origin = entry["origin"]
    if not origin or origin.get("pretrained", False) is False:
        return False
    places = [origin["pretrained"]] if isinstance(origin["pretrained"], str) else []
    map_places(origin["name"], lambda place: places.append(place) or place)  # type: ignore[func-returns-value]
    return all(_is_place(place) for place in places)


def _is_place(place: str) -> bool:
    # A name of the hub is no path; it is found again as it was found.
    return not Path(place).is_absolute() or Path(place).exists()


def _merged(model: VisionLanguageModel, part: Part, manifest: dict[str, Any]) -> bool:
    """Say whether adapters have gone into a part's weights, all of which are other ones then."""
    if part == "llm":
        return "adapter" in model.trained and not manifest["llm"]["adapter"]
    adapted = any(path.split(".")[0] == "encoder" for path in manifest.get("adapters", {}))
    return "encoder adapter" in model.trained and not adapted


def _plain(part: Part, name: str) -> str:
    return plain_name(f"{part}.{name}").removeprefix(f"{part}.")
