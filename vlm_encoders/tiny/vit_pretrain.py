"""Pre-training of the embedded ViT: every 8x8 patch names what stands in its cell."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vlm_encoders.tiny import scenes

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": scenes.SIDE,
    "patch_size": scenes.CELL_SIDE // 2,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 0,
    "class_token": False,
    "global_pool": "",
}
NUM_WORDS = 11
_PLACES = scenes.ROWS * scenes.COLUMNS


@dataclass(frozen=True)
class VitRecipe:
    """How long and how hard the ViT is trained."""

    steps: int = 1500
    batch: int = 48
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    ema: float = 0.995


class _Blots:
    """Draws scenes from distorted digit images, in tensors."""

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


class _Namer(nn.Module):
    """The ViT and a linear head that names each patch; the head is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.vit = timm.create_model(ARCHITECTURE, **MODEL_ARGS)
        self.head = nn.Linear(MODEL_ARGS["embed_dim"], NUM_WORDS)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.vit.forward_features(pixels))


def _patch_words(cells: Tensor) -> Tensor:
    """Spread the words of cells (B, 16) over the patches (B, 64) that they cover."""
    board = cells.unflatten(1, (scenes.ROWS, scenes.COLUMNS))
    return board.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Give the share of the learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def accuracy(namer: nn.Module, *, count: int, seed: int) -> dict[str, float]:
    """Measure the namer on pictures of held-out digits, drawn without distortion.

    Returns:
        The share of right patches of digit cells, of right digit cells and of right blank cells.
    """
    rng = np.random.default_rng(seed)
    boards = [scenes.random_scene("held_out", rng) for _ in range(count)]
    pictures = torch.from_numpy(np.stack([np.asarray(scenes.draw(board)) for board in boards]))
    pixels = pictures.permute(0, 3, 1, 2).float() / (scenes.PAPER / 2) - 1
    cells = torch.tensor([board.cells for board in boards]) + 1
    with torch.no_grad():
        scores = torch.cat([namer(part) for part in pixels.split(64)]).log_softmax(-1)
    patches = scores.argmax(-1) == _patch_words(cells)
    grid = (len(boards), scenes.ROWS, 2, scenes.COLUMNS, 2, NUM_WORDS)
    named = scores.view(grid).sum((2, 4)).argmax(-1).flatten(1) == cells
    digit = cells > 0
    return {
        "patches_of_digits": patches[_patch_words(digit)].float().mean().item(),
        "digit_cells": named[digit].float().mean().item(),
        "blank_cells": named[~digit].float().mean().item(),
    }


def train_vit(folder: Path, recipe: VitRecipe, seed: int) -> dict[str, float]:
    """Train the ViT and save it in fp16 as a timm `local-dir` folder.

    Returns:
        The parameter count and the held-out figures of the saved weights.
    """
    torch.manual_seed(seed)
    namer = _Namer()
    ema = AveragedModel(namer, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    optimizer = torch.optim.AdamW(namer.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, recipe.steps, recipe.warmup)
    )
    blots = _Blots("train", torch.Generator().manual_seed(seed))
    for step in range(recipe.steps):
        pixels, cells = blots.batch(recipe.batch)
        loss = F.cross_entropy(
            namer(pixels).flatten(0, 1),
            _patch_words(cells).flatten(),
            label_smoothing=recipe.label_smoothing,
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(namer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(namer)
        if (step + 1) % 100 == 0:
            print(f"vit step {step + 1}/{recipe.steps} loss {loss.item():.3f}", flush=True)
    trained = ema.module.half().float().eval()
    _save(trained.vit, folder)
    figures = accuracy(trained, count=2000, seed=seed)
    return {"parameters": sum(weight.numel() for weight in trained.vit.parameters()), **figures}


def _save(vit: nn.Module, folder: Path) -> None:
    from timm.models import save_for_hf

    vit.pretrained_cfg = {
        "architecture": ARCHITECTURE,
        "input_size": [3, scenes.SIDE, scenes.SIDE],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "cc-by-4.0",
    }
    save_for_hf(vit.half(), folder, model_args=MODEL_ARGS, safe_serialization=True)
