"""Filling a token cache: before the first step, each process its share of the samples."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from connectors.errors import VlmError
from connectors.tokens import VisualTokens
from vlm_encoders.preprocess.header import image_size
from vlm_encoders.tiling.plan import Size, TilePlan
from vlm_encoders.training.kept.kept_tokens import TokenCache, image_key
from vlm_encoders.training.kept.token_store import TokenWriter
from vlm_encoders.vlm.embed import dtype_of, view_tokens

if TYPE_CHECKING:
    from vlm_encoders.encoder import Encoder

__all__ = ["fill_cache"]

_PROBES = 64
_VIEWS = 32
_SAY_EVERY = 60.0


def fill_cache(
    cache: TokenCache,
    dataset: Any,
    encoder: Encoder,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    chunk_tokens: int | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Encode the images of a dataset that the cache does not hold yet, and wait for the other processes.

    An image that cannot be read is passed over: its sample says so when it is made.

    Args:
        cache: of the encoder.
        dataset: has `images(index)` and a length.
        encoder: frozen.
        device: where it encodes; it is put back afterwards.
        rank: this process.
        world: number of processes, each of which takes its share of the samples.
        workers: processes that make pixels; 0 for this one.
        chunk_tokens: the most tokens that the encoder sees at once, but one image at least.
        say: hears of size and progress.

    Raises:
        VlmError: the disk lacks the room, or is not one that all processes see; raised on every process.
    """
    _check_room(cache, dataset, say)
    most = chunk_tokens or _VIEWS * view_tokens(encoder.spec)
    home = next(encoder.parameters()).device
    writer = TokenWriter(cache.folder)
    failed: Exception | None = None
    try:
        with writer, torch.no_grad(), torch.autocast(device.type, dtype=cache.autocast, enabled=bool(cache.autocast)):
            encoder.to(device)
            for batch in _batches(_load(cache, dataset, rank, world, workers, say), cache, most):
                for image, values in zip(batch, _encode(encoder, cache, batch, device), strict=True):
                    writer.add(image.key, image.size, values)
        writer.note("about.json", cache.about)
    except Exception as error:  # noqa: BLE001 - raised again, once the other processes do not wait any more
        failed = error
    encoder.to(home)
    met = _meet([str(file) for file in writer.files], None if failed is None else str(failed), world)
    if failed is not None or met is not None:
        raise failed or VlmError(met)
    cache.store.load()


class _Image(NamedTuple):
    """An image to encode: its key, size and plan, and the pixels of its views."""

    key: bytes
    size: Size
    plan: TilePlan
    pixels: Tensor | list[Tensor]


class _Unknown(Dataset[list[_Image]]):
    """By sample, the images that the cache does not hold; made in worker processes where there are any."""

    def __init__(self, cache: TokenCache, dataset: Any) -> None:
        self.cache = cache
        self.dataset = dataset

    def __getitem__(self, index: int) -> list[_Image]:
        found = []
        with suppress(VlmError):
            for image in self.dataset.images(index):
                with suppress(VlmError):
                    key = image_key(image)
                    if self.cache.store.find(key) is None:
                        found.append(self._make(key, image))
        return found

    def _make(self, key: bytes, image: Any) -> _Image:
        processor = self.dataset.processor
        prompts = processor._prompts  # noqa: SLF001
        levels = prompts.pixels.load(image)
        size = prompts.pixels.size(levels)
        plan = prompts.counts.plan(size, processor.max_image_tokens)
        return _Image(key, size, plan, prompts.pixels(levels, plan))


def _load(
    cache: TokenCache, dataset: Any, rank: int, world: int, workers: int, say: Callable[[str], None] | None
) -> Iterator[_Image]:
    mine = range(rank, len(dataset), world)
    loader: DataLoader[Any] = DataLoader(
        _Unknown(cache, dataset),
        batch_size=None,
        sampler=mine,
        collate_fn=_as_it_is,
        num_workers=workers,
        # Its own generator: the loader must not draw from the one that training uses.
        generator=torch.Generator().manual_seed(0),
    )
    done: set[bytes] = set()
    told = time.monotonic()
    for count, images in enumerate(loader, start=1):
        for image in images:
            if image.key not in done:
                done.add(image.key)
                yield image
        if say is not None and time.monotonic() - told > _SAY_EVERY:
            told = time.monotonic()
            say(f"token cache: {count} of {len(mine)} samples are looked through, {len(done)} images are new")


def _batches(images: Iterator[_Image], cache: TokenCache, most: int) -> Iterator[list[_Image]]:
    batch: list[_Image] = []
    tokens = 0
    for image in images:
        count = sum(spec.num_tokens + spec.num_prefix for spec in cache.shapes(image.plan))
        if batch and tokens + count > most:
            yield batch
            batch, tokens = [], 0
        batch.append(image)
        tokens += count
    if batch:
        yield batch


def _encode(encoder: Encoder, cache: TokenCache, batch: list[_Image], device: torch.device) -> Iterator[list[Tensor]]:
    """Give the values of each image: the tokens of its views, then their prefixes."""
    dtype = dtype_of(encoder)
    views = [view.to(device, dtype) for image in batch for view in image.pixels]
    if cache.native:
        encoded = iter(encoder.forward_packed(views).split())
    else:
        visual: VisualTokens = encoder(torch.stack(views))
        prefixes = [None] * len(views) if visual.prefix is None else visual.prefix.split(1)
        encoded = (
            VisualTokens(each, visual.grid, front) for each, front in zip(visual.tokens.split(1), prefixes, strict=True)
        )
    for image in batch:
        own = [next(encoded) for _ in range(image.plan.num_views)]
        values = [view.tokens for view in own] + [view.prefix for view in own if view.prefix is not None]
        yield [each.to("cpu", cache.store.dtype) for each in values]


def _check_room(cache: TokenCache, dataset: Any, say: Callable[[str], None] | None) -> None:
    """Estimate the bytes to come by some samples, and refuse a disk that has no room for them.

    Raises:
        VlmError: it has none.
    """
    step = max(1, len(dataset) // _PROBES)
    places = range(0, len(dataset), step)
    sizes: list[int] = []
    for index in places:
        with suppress(VlmError):
            for image in dataset.images(index):
                if cache.store.find(image_key(image)) is None:
                    plan = cache.counts.plan(image_size(image), dataset.processor.max_image_tokens)
                    sizes.append(cache.bytes_of(plan))
    if not sizes:
        return
    images = round(len(sizes) * len(dataset) / len(places))
    needed = images * sum(sizes) // len(sizes)
    free = shutil.disk_usage(_existing(cache.folder)).free
    said = f"about {images} images of {_amount(sum(sizes) // len(sizes))} each, {_amount(needed)} in all"
    if needed > free:
        raise VlmError(
            f"the token cache '{cache.folder}' is to hold {said}, its disk has {_amount(free)} left; name a folder on "
            "another disk by token_cache, or leave it out"
        )
    if say is not None:
        say(f"token cache '{cache.folder}': encoding {said}; {_amount(free)} are free")


def _meet(files: list[str], failure: str | None, world: int) -> str | None:
    """Wait for all processes; say why all must stop if one failed, or does not see what another wrote."""
    if world == 1:
        return failure
    from accelerate.utils import gather_object

    met = gather_object([(failure, files)])
    unseen = [file for _, written in met for file in written if not Path(file).exists()]
    blind = f"'{unseen[0]}' is not seen by all processes; name a folder that they share" if unseen else None
    failures = [*(each for each, _ in met), *gather_object([blind])]
    return next((each for each in failures if each is not None), None)


def _as_it_is(value: Any) -> Any:
    return value


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _amount(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
