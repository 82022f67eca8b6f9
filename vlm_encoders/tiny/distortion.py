"""Endless scenes of distorted digit images, drawn in tensors, for the pre-training of the ViT."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_encoders.tiny import scenes

_PLACES = scenes.ROWS * scenes.COLUMNS


class DistortedScenes:
    """Draws batches of scenes in which every digit image is distorted anew.

    Args:
        split: Whose digit images are drawn.
        generator: Draws everything that is random.
    """

    def __init__(self, split: scenes.Split, generator: torch.Generator) -> None:
        images, digits = scenes.digit_images()
        chosen = scenes.split_indices(split)
        self.ink = torch.from_numpy(images[chosen])[:, None] / scenes.FULL_INK
        self.digits = torch.from_numpy(digits[chosen])
        self.generator = generator

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def distort(self, ink: Tensor) -> Tensor:
        """Turn, scale, shear, shift and bend (B, 1, 8, 8) ink into (B, 1, 14, 14)."""
        count = len(ink)
        angle, shear = self._uniform(-0.3, 0.3, count), self._uniform(-0.25, 0.25, count)
        wide, high = self._uniform(0.85, 1.2, count), self._uniform(0.85, 1.2, count)
        shift = self._uniform(-0.2, 0.2, count, 2)
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        lean = torch.stack([torch.stack([wide, shear], -1), torch.stack([torch.zeros(count), high], -1)], -2)
        theta = torch.cat([turn @ lean, shift[..., None]], -1)
        side = scenes.DIGIT_SIDE
        places = F.affine_grid(theta, [count, 1, side, side], align_corners=False)
        bend = F.interpolate(self._uniform(-0.15, 0.15, count, 2, 4, 4), (side, side), mode="bicubic")
        drawn = F.grid_sample(ink, places + bend.permute(0, 2, 3, 1), align_corners=False)
        return self._stroke(drawn)

    def _stroke(self, drawn: Tensor) -> Tensor:
        """Make strokes thicker, thinner, paler or darker."""
        count = len(drawn)
        thick = F.max_pool2d(drawn, 3, 1, 1)
        thin = -F.max_pool2d(-drawn, 3, 1, 1)
        weight = self._uniform(-0.3, 0.3, count, 1, 1, 1)
        drawn = drawn + weight.clamp(min=0) * (thick - drawn) + weight.clamp(max=0) * (drawn - thin)
        return (drawn * self._uniform(0.7, 1.25, count, 1, 1, 1)).clamp(0, 1)

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw pixels (B, 3, S, S) from -1 to 1 and the word of each cell (B, 16)."""
        share = self._uniform(0.1, 1.0, count, 1)
        filled = torch.rand((count, _PLACES), generator=self.generator) < share
        picks = torch.randint(len(self.digits), (int(filled.sum()),), generator=self.generator)
        cells = torch.zeros(count, _PLACES, dtype=torch.long)
        cells[filled] = self.digits[picks] + 1
        paper = torch.full((count, _PLACES, scenes.CELL_SIDE, scenes.CELL_SIDE), float(scenes.PAPER))
        paper[..., 0, :] = paper[..., :, 0] = scenes.LINE
        inside = slice(1, 1 + scenes.DIGIT_SIDE)
        drawn = self.distort(self.ink[picks])[:, 0]
        paper[..., inside, inside][filled] = scenes.PAPER * (1 - drawn)
        board = paper.unflatten(1, (scenes.ROWS, scenes.COLUMNS)).permute(0, 1, 3, 2, 4)
        picture = board.reshape(count, 1, scenes.SIDE, scenes.SIDE)
        noise = torch.randn(picture.shape, generator=self.generator) * self._uniform(0, 12, count, 1, 1, 1)
        pixels = (picture + noise).clamp(0, scenes.PAPER) / (scenes.PAPER / 2) - 1
        return pixels.expand(-1, 3, -1, -1), cells
