"""Tokens of a frozen encoder on the disk: each image is encoded once, whatever the epochs and the runs.

A frozen encoder gives the same tokens for the same picture each time. They are kept under a key of all that they
depend on: the encoder's weights, spec and precision, and how images are cut. Of a picture the key is its file's path,
size and time of change, or the content where it is embedded: one that changes is encoded anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from connectors.errors import VlmError
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens
from vlm_encoders.preprocess import ImageLike
from vlm_encoders.preprocess.forms import is_encoded
from vlm_encoders.preprocess.load import load_levels, read_encoded, tensor_of
from vlm_encoders.tiling.plan import TilePlan
from vlm_encoders.training.kept.token_store import Entry, TokenStore
from vlm_encoders.vlm.embed import dtype_of
from vlm_encoders.vlm.fingerprint import module_hash

if TYPE_CHECKING:
    from vlm_encoders.encoder import Encoder
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["TokenCache", "image_key"]

FORMAT = 1


class TokenCache:
    """The tokens that an encoder gives for the images of a processor, in a folder of their own below `folder`.

    It holds no weights, so it can be sent to the workers of a data loader.

    Args:
        folder: of all caches.
        encoder: frozen.
        processor: makes its pixels.
        dtype: to keep tokens in; None for that of the encoder's output, which changes no value.
        autocast: dtype in which the encoder computes, None for that of its weights.

    Attributes:
        store: what is there.
        view_spec: the tokens of a view of the encoder's own size.

    Raises:
        VlmError: the encoder trains, or `dtype` is none of floating point.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: Encoder,
        processor: VLMProcessor,
        *,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
        if trained:
            raise VlmError(
                f"token_cache keeps what a frozen encoder gives, and '{encoder.spec.name}' trains ({len(trained)} "
                f"parameters, '{trained[0]}' first); leave token_cache out, or freeze the encoder"
            )
        if dtype is not None and not dtype.is_floating_point:
            raise VlmError(f"tokens are kept as floats, got dtype={dtype}; use torch.bfloat16, or None for their own")
        self.spec = encoder.spec
        self.counts = processor._prompts.counts  # noqa: SLF001
        self.native = processor.tiler.native
        self.view_spec: TokenSpec = encoder.token_spec
        self.autocast = autocast
        kept = dtype or _output_dtype(encoder, autocast)
        about = {
            "format": FORMAT,
            "weights": module_hash(encoder.state_dict()),
            "spec": repr(encoder.spec),
            "tiler": processor.tiler.config(),
            "max_image_tokens": processor.max_image_tokens,
            "computed": str(autocast or dtype_of(encoder)),
            "kept": str(kept),
        }
        text = json.dumps(about, sort_keys=True, indent=2)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = Path(folder).expanduser().absolute() / f"{_plain(encoder.spec.name)}-{digest}"
        self.about = text
        self.store = TokenStore(self.folder, kept)

    def shapes(self, plan: TilePlan) -> list[TokenSpec]:
        """Give the tokens of each view of a plan, as the encoder gives them."""
        if not self.native:
            return [self.view_spec] * plan.num_views
        return [self.spec.token_spec(view) for view in plan.views]

    def bytes_of(self, plan: TilePlan) -> int:
        """Count the bytes of an image's tokens."""
        values = sum((spec.num_tokens + spec.num_prefix) * spec.dim for spec in self.shapes(plan))
        return values * self.store.dtype.itemsize

    def visual(self, planned: Sequence[tuple[Entry, TilePlan]]) -> VisualTokens | PackedTokens | None:
        """Read the tokens of the views of some images; None of no image."""
        views = [view for entry, plan in planned for view in self._views(entry, plan)]
        if not views:
            return None
        if self.native:
            return PackedTokens.join(views)
        prefixes = [view.prefix for view in views if view.prefix is not None]
        tokens = torch.cat([view.tokens for view in views])
        return VisualTokens(tokens, views[0].grid, torch.cat(prefixes) if prefixes else None)

    def _views(self, entry: Entry, plan: TilePlan) -> list[VisualTokens]:
        specs = self.shapes(plan)
        counts = [spec.num_tokens * spec.dim for spec in specs]
        prefix = [spec.num_prefix * spec.dim for spec in specs]
        parts = self.store.read(entry).split([*counts, *prefix])
        views = []
        for spec, tokens, front in zip(specs, parts, parts[len(specs) :], strict=False):
            before = front.view(1, spec.num_prefix, spec.dim) if spec.num_prefix else None
            views.append(VisualTokens(tokens.view(1, spec.num_tokens, spec.dim), spec.grid, before))
        return views


def image_key(image: ImageLike) -> bytes:
    """Give 16 bytes that are other ones for another picture.

    Of a path it is not the content that is read, but the file's size and time of change.

    Raises:
        VlmError: the image is missing or cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(image, (str, Path)):
        try:
            state = Path(image).stat()
        except OSError:
            # Loading it says what is wrong in the words that are known.
            load_levels(image, by_torch=False)
            raise
        digest.update(f"{os.path.abspath(image)}\n{state.st_size}\n{state.st_mtime_ns}".encode())  # noqa: PTH100
    elif is_encoded(image):
        digest.update(read_encoded(image)[0])
    else:
        levels = tensor_of(load_levels(image, by_torch=True))
        digest.update(f"{tuple(levels.shape)}\n".encode())
        digest.update(levels.contiguous().numpy().data)
    return digest.digest()


def _output_dtype(encoder: Encoder, autocast: torch.dtype | None) -> torch.dtype:
    device = next(encoder.parameters()).device
    pixels = torch.zeros(1, *encoder.pixel_shape, device=device, dtype=dtype_of(encoder))
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        tokens: Tensor = encoder(pixels).tokens
    return tokens.dtype


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)[-60:].strip("-.")
