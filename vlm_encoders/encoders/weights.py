"""Where weights lie: a local folder or file, the hub's cache, or the hub itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.errors import VlmError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["find_weights", "load_state", "read_json", "snapshot", "weight_files"]

_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def find_weights(owner: str, weights: str | None, *, pretrained: bool | str) -> Path:
    """Give the local folder or file that holds the weights, fetched if need be.

    Args:
        owner: the encoder's name, for messages.
        weights: hub id, or local folder or file, of the released weights.
        pretrained: True for `weights`, or a local folder or file.

    Raises:
        VlmError: there are no such weights, here or on the hub.
    """
    if isinstance(pretrained, str):
        path = Path(pretrained).expanduser()
        if not path.exists():
            raise VlmError(f"{owner}: pretrained='{pretrained}' does not exist; give a folder or file with weights")
        return path
    if weights is None:
        raise VlmError(f"{owner}: no released weights are known; pass pretrained=False or a local folder")
    local = Path(weights).expanduser()
    return local if local.exists() else snapshot(weights, owner)


def snapshot(repo: str, owner: str, *, weights: bool = True) -> Path:
    """Give the local snapshot of a hub repository: its configs, and its weights if wanted.

    Raises:
        VlmError: it is not in the cache and the hub cannot be reached, or has no such repository.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        cached = _cached(repo, (*_FILES, *_INDEXES) if weights else ("config.json",))
        if cached is not None:
            return cached
        _require_network(owner)
        wanted = ["*.json"]
        if weights:
            # One form of the weights is enough: many repositories hold five.
            names = hub.HfApi().list_repo_files(repo)
            safe = any(name.endswith(".safetensors") and "/" not in name for name in names)
            wanted.append("*.safetensors" if safe else "*.bin")
        return Path(hub.snapshot_download(repo, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except HFValidationError:
        raise VlmError(f"{owner}: '{repo}' is neither a folder nor a hub id such as org/name") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise VlmError(f"{owner}: the hub does not give '{repo}' ({reason}); pass a local folder instead") from error


def weight_files(path: Path, owner: str) -> list[Path]:
    """Give the files that hold the weights of a folder, or the file itself.

    Raises:
        VlmError: the folder holds none.
    """
    if path.is_file():
        return [path]
    for name in _FILES:
        if (path / name).is_file():
            return [path / name]
    for name in _INDEXES:
        if (path / name).is_file():
            return sorted(path.glob("*.safetensors" if "safetensors" in name else "*.bin"))
    alone = sorted(path.glob("*.safetensors"))
    if len(alone) == 1:
        return alone
    raise VlmError(f"{owner}: folder '{path}' holds no weights; expected one of {', '.join(_FILES)}")


def load_state(path: Path, owner: str) -> dict[str, Tensor]:
    """Read all tensors of a folder or file: safetensors, or `.bin` by `weights_only`.

    Raises:
        VlmError: a file is broken or holds more than tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for file in weight_files(path, owner):
        try:
            if file.suffix == ".safetensors":
                state.update(load_file(file))
            else:
                state.update(torch.load(file, map_location="cpu", weights_only=True))
        except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
            raise VlmError(f"{owner}: weights '{file}' cannot be read: {error}") from error
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


def _cached(repo: str, names: tuple[str, ...]) -> Path | None:
    import huggingface_hub as hub

    for name in names:
        found = hub.try_to_load_from_cache(repo, name)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _require_network(owner: str) -> None:
    """Ask the hub once: its own client would retry for 24 s before it gives up."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    sentence = f"no network and no local weights for '{owner}'; pass pretrained=False or set HF_HOME"
    if constants.HF_HUB_OFFLINE:
        raise VlmError(sentence)
    try:
        hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        raise VlmError(sentence) from error
