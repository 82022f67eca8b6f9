"""Image places in the text: expand them to the token count, fill them with embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from connectors.errors import VlmError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_places", "expand_placeholders", "fill_placeholders"]


def expand_placeholders(ids: Sequence[int], image_token_id: int, counts: Sequence[int]) -> list[int]:
    """Repeat each image placeholder as often as its image gives tokens.

    Args:
        ids: token ids with one placeholder an image.
        image_token_id: the placeholder's id.
        counts: tokens of each image, in order.

    Raises:
        VlmError: the text does not hold one placeholder an image.
    """
    check_places(sum(token == image_token_id for token in ids), len(counts))
    expanded: list[int] = []
    remaining = iter(counts)
    for token in ids:
        expanded.extend([token] * (next(remaining) if token == image_token_id else 1))
    return expanded


def check_places(places: int, images: int) -> None:
    """Hold the number of placeholders to that of the images.

    Raises:
        VlmError: they differ.
    """
    if places != images:
        raise VlmError(
            f"the text holds {places} image placeholder{'s' * (places != 1)}, {images} "
            f"image{'s' * (images != 1)} came; write one placeholder for each image"
        )


def fill_placeholders(text: Tensor, images: Tensor | None, places: Tensor) -> Tensor:
    """Put image embeddings at the image places of the text.

    Args:
        text: (B, T, H) embeddings of the ids; at image places their values are ignored.
        images: (M, H) image embeddings, the images of the batch in order, or None.
        places: (B, T) bool, True at image places.

    Returns:
        (B, T, H).

    Raises:
        VlmError: the number of places is not M.
    """
    wanted = int(places.sum())
    given = 0 if images is None else images.shape[0]
    if wanted != given:
        raise VlmError(
            f"the text holds {wanted} image placeholders, the images gave {given} tokens; "
            "make the text with the VLMProcessor of this encoder, connector and tiler"
        )
    if images is None:
        return text
    return text.masked_scatter(places[:, :, None], images.to(text.dtype))
