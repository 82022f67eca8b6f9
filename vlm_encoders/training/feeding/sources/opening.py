"""Opens the data of a run, whatever it is."""

from __future__ import annotations

from pathlib import Path

from connectors.errors import VlmError
from vlm_encoders.training.feeding.records import read_records
from vlm_encoders.training.feeding.sources.base import Opened
from vlm_encoders.training.feeding.sources.hub import open_hub
from vlm_encoders.training.feeding.sources.jsonl import JsonLines
from vlm_encoders.training.feeding.sources.spec import DataName
from vlm_encoders.training.feeding.sources.tars import TarShards

__all__ = ["open_records"]


def open_records(data: str | Path, image_folder: str | Path | None = None) -> Opened:
    """Open conversations: a JSON or JSONL file, a Hugging Face dataset, or tar shards.

    Args:
        data: `data.json`, `data.jsonl`; `hf:NAME_OR_FOLDER[split=train,name=CONFIGURATION,revision=main,
            streaming=true]`; `shards/*.tar`, `shards/{000..127}.tar`. `[caption=COLUMN]` behind the last two makes
            a column, `txt` in shards, the answer to the image alone.
        image_folder: folder that relative image paths start from; None for that of the data.

    Returns:
        The rows, by index or as a stream, each of which `as_record` takes.

    Raises:
        VlmError: the data cannot be opened, or holds nothing.
    """
    name = DataName.parse(data)
    folder = name.folder if image_folder is None else Path(image_folder)
    if name.kind == "tar":
        return Opened(TarShards(name.place), folder, name.options.get("caption"))
    if name.kind == "hf":
        return Opened(open_hub(name), folder, name.options.get("caption"))
    return Opened(read_records(name.place) if _is_list(Path(name.place)) else JsonLines(name.place), folder)


def _is_list(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            while start := file.read(4096):
                if start.lstrip():
                    return start.lstrip()[:1] == b"["
    except OSError as error:
        raise VlmError(f"{path}: cannot be read ({error.strerror}); give a JSON or JSONL file") from error
    return False
