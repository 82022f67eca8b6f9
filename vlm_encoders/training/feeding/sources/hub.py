"""Hugging Face datasets, from the Hub or a folder, by index or streaming."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from connectors.errors import VlmError
from vlm_encoders.training.feeding.sources.base import share_shards
from vlm_encoders.training.feeding.sources.spec import DataName

__all__ = ["HubRecords", "HubStream", "open_hub"]


def open_hub(data: DataName) -> HubRecords | HubStream:
    """Open a dataset of the Hub, one that `save_to_disk` wrote, or a folder of Parquet, Arrow or JSON files.

    Raises:
        VlmError: `datasets` is not installed, or the dataset, its configuration or split cannot be opened.
    """
    try:
        import datasets
    except ImportError as error:
        raise VlmError(
            f"'hf:{data.place}' needs the library datasets, which is not installed; pip install 'vlm-encoders[data]'"
        ) from error
    split = data.options.get("split", "train")
    try:
        if (Path(data.place) / "dataset_dict.json").is_file() or (Path(data.place) / "state.json").is_file():
            opened = datasets.load_from_disk(data.place)
        else:
            opened = datasets.load_dataset(
                data.place,
                data.options.get("name"),
                split=split,
                revision=data.options.get("revision"),
                streaming=data.streaming,
            )
    except Exception as error:
        # Hub, network, builders and Arrow each raise their own; all mean that there is nothing to train on.
        first = " ".join(str(error).split()) or type(error).__name__
        raise VlmError(f"the dataset 'hf:{data.place}' cannot be opened: {first[:300]}") from error
    if isinstance(opened, dict):
        if split not in opened:
            raise VlmError(f"the dataset 'hf:{data.place}' has no split '{split}'; it has {', '.join(opened)}")
        opened = opened[split]
    opened = _undecoded(opened)
    if not data.streaming:
        return HubRecords(data.place, opened)
    if isinstance(opened, datasets.Dataset):
        opened = opened.to_iterable_dataset(num_shards=max(1, len(opened.cache_files)))
    return HubStream(data.place, opened)


class HubRecords:
    """The rows of a dataset by index, images as their encoded bytes.

    Args:
        name: of the dataset.
        dataset: as `datasets` opened it.

    Raises:
        VlmError: it is empty.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        if not len(dataset):
            raise VlmError(f"the dataset 'hf:{name}' is empty; there is nothing to train on")
        self.name = name
        self.dataset = dataset

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Give one row."""
        return self.dataset[index]

    def __iter__(self) -> Iterator[Any]:
        """Give all rows."""
        return iter(self.dataset)


class HubStream:
    """The rows of a dataset as they come, images as their encoded bytes.

    Args:
        name: of the dataset.
        dataset: as `datasets` opened it, streaming.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self.dataset = dataset

    def rows(
        self, *, seed: int | None = None, epoch: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[str, Any]]:
        """Give the rows of one pass that are those of one process; see `RowStream.rows`."""
        share = share_shards(self.dataset.num_shards, seed=seed, epoch=epoch, rank=rank, world=world)
        # Not by the library's own shuffle: it opens many shards at once, and waits for seconds at their end.
        rows = islice(self._chained(share.shards), share.first, None, share.every)
        for number in count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                first = " ".join(str(error).split()) or type(error).__name__
                raise VlmError(
                    f"the dataset 'hf:{self.name}' cannot be read on after row {number} of pass {epoch} on process "
                    f"{rank}: {first[:300]}; resume the run when it can be reached"
                ) from error
            yield f"row {number} of pass {epoch}{_id_of(row)}", row

    def _chained(self, shards: list[int]) -> Iterator[Any]:
        for shard in shards:
            yield from self.dataset.shard(num_shards=self.dataset.num_shards, index=shard)


def _id_of(row: Any) -> str:
    given = [row[name] for name in ("id", "__key__") if row.get(name) is not None]
    return f" (id '{given[0]}')" if given else ""


def _undecoded(dataset: Any) -> Any:
    """Let images come as bytes: they are decoded in the workers, and what is passed over never is."""
    for column, feature in (dataset.features or {}).items():
        without = _without_decoding(feature)
        if without is not None:
            dataset = dataset.cast_column(column, without)
    return dataset


def _without_decoding(feature: Any) -> Any:
    """Give the feature of a column of images, or of lists of them, that gives bytes; None for another column."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return datasets.List(datasets.Image(decode=False)) if isinstance(inner, datasets.Image) else None
