"""A mix of image sizes through SigLIP 2 NaFlex: our packs against transformers' padding, and timm's.

python benchmarks/packing.py [--device cuda] [--dtype bfloat16] [--layers 12] [--rounds 7] [--plot cost.svg]
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from paired import describe_machine, measure, table
from torch import Tensor

from vlm_encoders.encoder import Encoder
from vlm_encoders.packing import Packer, encode_packs
from vlm_encoders.registry import create_encoder
from vlm_encoders.tiling import AnySizeTiler

PATCH, TIMM = 16, "naflexvit_base_patch16_gap"
PADDED, ALONE = "transformers, padded", "transformers, one at a time"
OURS_ALONE, OURS = "vlm-encoders, one at a time", "vlm-encoders, packs"
MIX = {
    "photos": [(3024, 4032), (1080, 1440), (320, 480), (480, 640), (267, 400), (640, 480), (333, 500), (225, 400)],
    "small pictures": [(240, 320), (200, 300), (256, 256), (180, 240), (128, 128), (300, 300)],
    "screenshots": [(1080, 1920), (2400, 1080), (300, 400), (360, 640)],
    "documents": [(2200, 1700), (1123, 794)],
    "thin strips": [(64, 1200), (900, 80), (48, 640), (120, 600)],
}
"""(height, width) of images, px."""


def views_of(max_patches: int) -> list[Tensor]:
    """Make random pixels (3, H, W) in the sizes that the tiler gives the mix, which it enlarges nowhere."""
    tiler = AnySizeTiler(patch=PATCH, min_pixels=1, max_pixels=max_patches * PATCH**2)
    generator = torch.Generator().manual_seed(0)
    sizes = [tiler.view_size(size) for group in MIX.values() for size in group]
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def grid_of(view: Tensor) -> tuple[int, int]:
    """Give the rows and columns of a view's patches."""
    return view.shape[1] // PATCH, view.shape[2] // PATCH


def patches_of(view: Tensor) -> Tensor:
    """Cut a view into patches (N, 768) as both libraries' processors do."""
    cut = view.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))
    patches: Tensor = cut.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
    return patches


def padded(views: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Give patches (B, length, 768), zeros behind each view's own, and which are real (B, length)."""
    pixels = views[0].new_zeros(len(views), length, 3 * PATCH**2)
    real = torch.zeros(len(views), length, dtype=torch.bool, device=pixels.device)
    for row, view in enumerate(views):
        patches = patches_of(view)
        pixels[row, : len(patches)], real[row, : len(patches)] = patches, True
    return pixels, real


def transformers_call(encoder: Encoder, views: Sequence[Tensor], length: int | None) -> Callable[[], list[Tensor]]:
    """Make transformers' model with the encoder's weights, and give its call on views padded to `length`, or alone."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(num_hidden_layers=encoder.spec.kept_layers, vision_use_head=False)
    parameter = next(encoder.parameters())
    model = Siglip2VisionModel(config).to(parameter.device, parameter.dtype).eval()
    model.load_state_dict(encoder.get_submodule("network").state_dict())
    counts = [len(patches_of(view)) for view in views]
    parts = [list(views)] if length else [[view] for view in views]
    batches = [
        (*padded(part, length or len(patches_of(part[0]))), torch.tensor([grid_of(view) for view in part]))
        for part in parts
    ]

    @torch.no_grad()
    def call() -> list[Tensor]:
        found = [
            tokens for pixels, real, grids in batches for tokens in model(pixels, real.int(), grids).last_hidden_state
        ]
        return [tokens[:count] for tokens, count in zip(found, counts, strict=True)]

    return call


def timm_call(encoder: Encoder, views: Sequence[Tensor], length: int) -> Callable[[], object]:
    """Make timm's model of the same shape, with weights of its own, and give its call on padded views."""
    import timm

    model: Any = timm.create_model(TIMM, depth=encoder.spec.kept_layers, num_classes=0)
    parameter = next(encoder.parameters())
    model = model.to(parameter.device, parameter.dtype).eval()
    pixels, real = padded(views, length)
    places = torch.zeros(*real.shape, 2, dtype=torch.long, device=pixels.device)
    for row, view in enumerate(views):
        rows, columns = grid_of(view)
        places[row, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))

    @torch.no_grad()
    def call() -> object:
        return model.forward_features(pixels, patch_coord=places, patch_valid=real)

    return call


def apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> str:
    """Say how far the tokens of images are apart."""
    most = max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))
    return "bit-equal" if most == 0 else f"apart by {most:.1e}"


def packed(encoder: Encoder, views: Sequence[Tensor], packer: Packer) -> list[Tensor]:
    """Encode views in packs, and give the tokens (N, D) of each."""
    with torch.no_grad():
        return [image.tokens[0] for image in encode_packs(encoder, views, packer).split()]


def alone(encoder: Encoder, views: Sequence[Tensor]) -> list[Tensor]:
    """Encode views one by one."""
    with torch.no_grad():
        return [encoder.forward_packed([view]).tokens for view in views]


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Fit a line, and give its slope, its start and R squared."""
    tokens, seconds = zip(*points, strict=True)
    slope, start = statistics.linear_regression(tokens, seconds)
    return slope, start, statistics.correlation(tokens, seconds) ** 2


def costs(encoder: Encoder, views: Sequence[Tensor], options: argparse.Namespace) -> list[tuple[float, float]]:
    """Measure the packs of ever larger parts of the mix: (tokens, median seconds) of each."""
    order = list(views)
    random.Random(0).shuffle(order)
    parts = [order[:count] for count in range(3, len(order) + 1, 3)]
    calls: dict[str, Callable[[], object]] = {
        str(len(part)): lambda part=part: packed(encoder, part, Packer(options.capacity))  # type: ignore[misc]
        for part in parts
    }
    seconds = measure(calls, options.rounds, options.device)
    tokens = [float(sum(len(patches_of(view)) for view in part)) for part in parts]
    return [(count, statistics.median(times)) for count, times in zip(tokens, seconds.values(), strict=True)]


def plot(points: Sequence[tuple[float, float]], file: Path, title: str) -> str:
    """Draw cost over tokens with a line through it, and say which."""
    from matplotlib.figure import Figure

    slope, start, square = line(points)
    ends = [0.0, max(tokens for tokens, _ in points)]
    said = f"{start * 1e3:.0f} ms + {slope * 1e6:.1f} µs a token, R² {square:.4f}"
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(ends, [start + slope * end for end in ends], color="#0b6e4f", linewidth=1, label=said)
    axes.plot(*zip(*points, strict=True), "o", color="#0b6e4f", markersize=5, label="images of many sizes, in packs")
    axes.set(
        xlabel="patch tokens of all images together", ylabel="seconds", xlim=(0, None), ylim=(0, None), title=title
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return said


def compare(encoder: Encoder, views: Sequence[Tensor], options: argparse.Namespace) -> None:
    """Measure packs against padding and against single images, and print a table."""
    packer = Packer(options.capacity)
    calls: dict[str, Callable[[], Any]] = {
        PADDED: transformers_call(encoder, views, options.max_patches),
        "timm NaFlexVit, padded": timm_call(encoder, views, options.max_patches),
        ALONE: transformers_call(encoder, views, None),
        OURS_ALONE: lambda: alone(encoder, views),
        OURS: lambda: packed(encoder, views, packer),
    }
    tokens = sum(len(patches_of(view)) for view in views)
    fill = tokens / len(views) / options.max_patches
    ours = calls[OURS]()
    differences = ", ".join(f"to {name} {apart(ours, calls[name]())}" for name in (OURS_ALONE, ALONE, PADDED))
    seconds = measure(calls, options.rounds, options.device)
    print(f"{title_of(options)}; {len(views)} images of {tokens} tokens:")
    print(f"fill {fill:.2f} padded to {options.max_patches}, {packer.fill:.2f} in packs of {options.capacity}")
    print(f"packs are {differences}")
    print(describe_machine(options.device))
    print(table(seconds, PADDED, {}))
    ratios = [theirs / mine for theirs, mine in zip(seconds[PADDED], seconds[OURS], strict=True)]
    times = f"{statistics.median(ratios):.2f} times as fast as padding ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"packs are {times}")


def title_of(options: argparse.Namespace) -> str:
    """Say what is measured."""
    return f"SigLIP 2 NaFlex B, {options.layers} of 12 layers, {options.dtype}, {options.device}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--max-patches", type=int, default=1024, help="patches of the largest view, and of padding")
    parser.add_argument("--capacity", type=int, default=2048, help="patch tokens of a pack")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="measure cost over tokens instead, and draw it into this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    layer = options.layers - 13
    encoder = create_encoder("siglip2-naflex-b-16", pretrained=False, feature_layer=layer, final_norm=True)
    encoder.to(options.device, dtype).eval()
    views = [view.to(options.device, dtype) for view in views_of(options.max_patches)]
    if options.plot:
        said = plot(costs(encoder, views, options), options.plot, title_of(options))
        print(f"{title_of(options)}: {said}")
    else:
        compare(encoder, views, options)


if __name__ == "__main__":
    main()
