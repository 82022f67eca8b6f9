"""Where weights lie: a local folder or file, the hub's cache, or the hub itself."""

from __future__ import annotations

from pathlib import Path

from connectors.errors import VlmError
from vlm_encoders.encoders.weight_files import (
    WEIGHT_NAMES,
    Wanted,
    load_state,
    missing_files,
    read_json,
    weight_files,
)

__all__ = ["complete", "find_weights", "load_state", "read_json", "snapshot", "weight_files"]


def find_weights(
    owner: str,
    weights: str | None,
    *,
    pretrained: bool | str,
    revision: str | None = None,
    names: tuple[str, ...] = WEIGHT_NAMES,
    wanted: Wanted | None = None,
) -> Path:
    """Give the local folder or file that holds the weights, fetched if need be.

    Args:
        owner: the encoder's name, for messages.
        weights: hub id, or local folder or file, of the released weights.
        pretrained: True for `weights`, or a local folder or file.
        revision: commit, tag or branch on the hub; None for the cached or newest main.
        names: of files and indexes, the first that is there wins.
        wanted: which keys are needed; shards without any are not fetched.

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
    if not local.exists():
        return snapshot(weights, owner, revision=revision, names=names, wanted=wanted)
    if revision is not None:
        raise VlmError(f"{owner}: '{weights}' is no hub id, so it has no revision '{revision}'; leave revision out")
    return local


def snapshot(
    repo: str,
    owner: str,
    *,
    weights: bool = True,
    revision: str | None = None,
    names: tuple[str, ...] = WEIGHT_NAMES,
    wanted: Wanted | None = None,
) -> Path:
    """Give the local snapshot of a hub repository: its configs, and its weights if wanted.

    Args:
        repo: hub id.
        owner: the encoder's name, for messages.
        weights: whether weights are needed too.
        revision: commit, tag or branch; None for the cached or newest main.
        names: of files and indexes with weights, the first that is there wins.
        wanted: which keys are needed; shards without any are not fetched.

    Raises:
        VlmError: it is not in the cache and the hub cannot be reached, or has no such repository or revision.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

    try:
        cached = _cached(repo, owner, revision, names if weights else ("config.json",), wanted)
        if cached is not None:
            return cached
        _require_network(owner, revision)
        return _fetch(repo, owner, revision, names if weights else (), wanted)
    except HFValidationError:
        raise VlmError(f"{owner}: '{repo}' is neither a folder nor a hub id such as org/name") from None
    except RevisionNotFoundError:
        raise VlmError(f"{owner}: '{repo}' has no revision '{revision}'; give a commit, tag or branch of it") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise VlmError(f"{owner}: the hub does not give '{repo}' ({reason}); pass a local folder instead") from error


def complete(folder: Path, repo: str, owner: str, names: tuple[str, ...]) -> bool:
    """Bring the first of some small files that a repository has into its snapshot.

    Args:
        folder: the snapshot, whose name is its commit.
        repo: hub id.
        owner: the encoder's name, for messages.
        names: of files, the most telling first.

    Returns:
        Whether this is known: False where neither the cache nor the hub can tell.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    if any((folder / name).is_file() for name in names):
        return True
    for name in names:
        # The cache remembers what the hub was found not to have.
        if hub.try_to_load_from_cache(repo, name, revision=folder.name) is not None:
            continue
        try:
            _require_network(owner, None)
            hub.hf_hub_download(repo, name, revision=folder.name)
        except LocalEntryNotFoundError:
            return False
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError, VlmError):
            return False
        return True
    return True


def _fetch(repo: str, owner: str, revision: str | None, names: tuple[str, ...], wanted: Wanted | None) -> Path:
    """Fetch the configs and one form of the weights: many repositories hold five."""
    import huggingface_hub as hub

    patterns = ["*.json"]
    if names:
        there = hub.HfApi().list_repo_files(repo, revision=revision)
        alone = [name for name in there if name.endswith(".safetensors") and "/" not in name]
        chosen = next((name for name in names if name in there), alone[0] if len(alone) == 1 else None)
        if chosen is None:
            raise VlmError(f"{owner}: '{repo}' holds none of {', '.join(names)}; pass a local file of it instead")
        if chosen.endswith(".index.json"):
            index = Path(hub.hf_hub_download(repo, chosen, revision=revision))
            patterns += [file.name for file in missing_files(index, owner, wanted)]
        else:
            patterns.append(chosen)
    return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))


def _cached(repo: str, owner: str, revision: str | None, names: tuple[str, ...], wanted: Wanted | None) -> Path | None:
    import huggingface_hub as hub

    for name in names:
        found = hub.try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(found, str):
            path = Path(found)
            incomplete = name.endswith(".index.json") and missing_files(path, owner, wanted)
            return None if incomplete else path.parent
    return None


def _require_network(owner: str, revision: str | None) -> None:
    """Ask the hub once: its own client would retry for 24 s before it gives up."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    which = "" if revision is None else f" at revision '{revision}'"
    sentence = f"no network and no local weights for '{owner}'{which}; pass pretrained=False or set HF_HOME"
    if constants.HF_HUB_OFFLINE:
        raise VlmError(sentence)
    try:
        hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        raise VlmError(sentence) from error
