"""Files that hold weights, read tensor by tensor: safetensors, or `.bin` by `weights_only`."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from connectors.errors import VlmError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OPEN_CLIP_NAMES", "WEIGHT_NAMES", "Wanted", "load_state", "missing_files", "read_json", "weight_files"]

Wanted: TypeAlias = Callable[[str], bool]
"""Whether the tensor of a key is to be read."""

_INDEX = ".index.json"
WEIGHT_NAMES = (
    *("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
"""Files and indexes of shards, the first that is there wins."""
OPEN_CLIP_NAMES = (*WEIGHT_NAMES[4:], *WEIGHT_NAMES[:4])
"""The same for OpenCLIP: its repositories often hold the weights in transformers' form too."""
# How training scripts of OpenCLIP and timm wrap the weights.
_WRAPPERS = ("state_dict", "model")


def weight_files(
    path: Path, owner: str, *, names: tuple[str, ...] = WEIGHT_NAMES, wanted: Wanted | None = None
) -> list[Path]:
    """Give the files that hold the wanted weights of a folder, or the file itself.

    Args:
        path: a folder or file.
        owner: the encoder's name, for messages.
        names: of files and indexes, the first that is there wins.
        wanted: which keys; shards without any are left out.

    Raises:
        VlmError: the folder holds none, or not all shards.
    """
    if path.is_file():
        return _shards(path, owner, wanted) if path.name.endswith(_INDEX) else [path]
    for name in names:
        if (path / name).is_file():
            return weight_files(path / name, owner, wanted=wanted)
    alone = sorted(path.glob("*.safetensors"))
    if len(alone) == 1:
        return alone
    raise VlmError(f"{owner}: folder '{path}' holds no weights; expected one of {', '.join(names)}")


def missing_files(index: Path, owner: str, wanted: Wanted | None = None) -> list[Path]:
    """Give the shards with wanted keys that an index names and that are not there."""
    return [file for file in _indexed(index, owner, wanted) if not file.is_file()]


def load_state(
    path: Path, owner: str, *, names: tuple[str, ...] = WEIGHT_NAMES, wanted: Wanted | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a folder or file: safetensors, or `.bin` by `weights_only`.

    Args:
        path: a folder or file.
        owner: the encoder's name, for messages.
        names: of files and indexes, the first that is there wins.
        wanted: which keys; None for all. Others are not brought into memory.

    Raises:
        VlmError: a file is missing, broken, or holds no tensors, or more than tensors.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(path, owner, names=names, wanted=wanted):
        try:
            state.update(_read_safe(file, wanted) if file.suffix == ".safetensors" else _read_bin(file, wanted))
        # Unpickling a damaged file can fail by any error: whatever its bytes happen to ask for.
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise VlmError(f"{owner}: weights '{file}' cannot be read: {reason}; give an intact file") from error
    return state


def read_json(path: Path, owner: str, writer: str = "transformers' save_pretrained") -> dict[str, Any]:
    """Read the JSON object of a checkpoint's folder, such as its config.

    Args:
        path: the file.
        owner: the encoder's name, for messages.
        writer: what writes such a file, for messages.

    Raises:
        VlmError: the file is missing, or holds no JSON object.
    """
    if not path.is_file():
        raise VlmError(f"{owner}: '{path.parent}' has no {path.name}; {writer} writes one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VlmError(f"{owner}: '{path}' is no JSON: {error}; repair the file") from error
    if not isinstance(content, dict):
        raise VlmError(f"{owner}: '{path}' holds no JSON object; repair the file")
    return content


def _indexed(index: Path, owner: str, wanted: Wanted | None) -> list[Path]:
    places = read_json(index, owner).get("weight_map")
    if not isinstance(places, dict):
        raise VlmError(f"{owner}: index '{index}' has no weight_map; repair the file")
    return sorted({index.parent / file for key, file in places.items() if wanted is None or wanted(key)})


def _shards(index: Path, owner: str, wanted: Wanted | None) -> list[Path]:
    missing = missing_files(index, owner, wanted)
    if missing:
        raise VlmError(f"{owner}: '{index.parent}' has no {missing[0].name}, which its index names; fetch it again")
    return _indexed(index, owner, wanted)


def _read_safe(file: Path, wanted: Wanted | None) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        keys = list(opened.keys())
        _require_tensors(keys)
        return {key: opened.get_tensor(key) for key in keys if wanted is None or wanted(key)}


def _read_bin(file: Path, wanted: Wanted | None) -> dict[str, Tensor]:
    import torch

    # Files of torch before 1.6 are no archives and cannot be mapped.
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError("it holds more than tensors by name")
    _require_tensors(content)
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): tensor for key, tensor in content.items()}
    return {key: tensor for key, tensor in content.items() if wanted is None or wanted(key)}


def _require_tensors(content: Collection[str]) -> None:
    if not content:
        raise ValueError("it holds no tensors")
