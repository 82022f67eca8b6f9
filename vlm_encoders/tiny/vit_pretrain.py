"""Pre-training of the embedded ViT: every 8x8 patch names what stands in its cell."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vlm_encoders.tiny import scenes
from vlm_encoders.tiny.distortion import DistortedScenes

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


@dataclass(frozen=True)
class VitRecipe:
    """How long and how hard the ViT is trained."""

    steps: int = 2000
    batch: int = 48
    lr: float = 1.5e-3
    warmup: float = 0.06
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    ema: float = 0.995


class _Namer(nn.Module):
    """The ViT and a linear head that names each patch; the head is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.vit: Any = timm.create_model(ARCHITECTURE, **MODEL_ARGS)
        self.head = nn.Linear(MODEL_ARGS["embed_dim"], NUM_WORDS)

    def forward(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.head(self.vit.forward_features(pixels))
        return scores


def _patch_words(cells: Tensor) -> Tensor:
    """Spread the words of cells (B, 16) over the patches (B, 64) that they cover."""
    board: Tensor = cells.unflatten(1, (scenes.ROWS, scenes.COLUMNS))
    board = board.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return board.flatten(1)


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
    import timm

    torch.manual_seed(seed)
    namer = _Namer()
    ema = AveragedModel(namer, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    optimizer = torch.optim.AdamW(namer.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, recipe.steps, pct_start=recipe.warmup, cycle_momentum=False
    )
    drawn = DistortedScenes("train", torch.Generator().manual_seed(seed))
    for step in range(recipe.steps):
        pixels, cells = drawn.batch(recipe.batch)
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
    namer.load_state_dict(ema.module.state_dict())
    _save(namer.vit, folder)
    namer.vit = timm.create_model(f"local-dir:{folder}", pretrained=True)
    figures = accuracy(namer.eval(), count=2000, seed=seed)
    return {"parameters": sum(weight.numel() for weight in namer.vit.parameters()), **figures}


def _save(vit: Any, folder: Path) -> None:
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
