"""JPEG files decoded by torchvision, where it is loaded already.

Its decoder gives the levels of Pillow's, bit by bit, and gives them to torch without a copy.
To import torchvision costs seconds, so the rule is: use it if the process has imported it
(timm, open_clip and transformers' image processors do), else leave the file to Pillow.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["decode_jpeg"]

# Orientation: whether rows and columns change places, and which axes are then turned round.
_UPRIGHT: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
_SAMPLINGS = ({(1, 1)}, {(1, 1), (2, 1)}, {(1, 1), (2, 2)})
"""Chroma 4:4:4, 4:2:2 and 4:2:0: those whose two decoders the tests hold equal."""


def decode_jpeg(image: Image.Image, data: bytes) -> Tensor | None:
    """Give levels (H, W, 3), upright, of the JPEG file that Pillow has opened; None to leave it to Pillow.

    It is left to Pillow if torchvision is not loaded, if its colours are neither RGB nor grey,
    and if torchvision finds it damaged: Pillow then says how.

    Source: torchvision.io.decode_jpeg; the orientations are those of Pillow's `exif_transpose`.
    """
    io: Any = sys.modules.get("torchvision.io")
    if image.format != "JPEG" or image.mode not in {"RGB", "L"} or not hasattr(io, "decode_jpeg"):
        return None
    if {(across, down) for _, across, down, _ in getattr(image, "layer", ())} not in _SAMPLINGS:
        return None
    import torch

    try:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with warnings.catch_warnings():
            # torchvision 0.29 announces that its decoders will go; without them Pillow decodes.
            warnings.simplefilter("ignore", DeprecationWarning)
            levels: Tensor = io.decode_jpeg(encoded, io.ImageReadMode.RGB).permute(1, 2, 0)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001
        # Pillow meets the same fault next, and its sentence names the file.
        return None
    swapped, turned = _UPRIGHT.get(orientation, (False, ()))
    if swapped:
        levels = levels.transpose(0, 1)
    return levels.flip(turned) if turned else levels
