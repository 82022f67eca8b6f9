"""Images to normalised tiles: AnyRes and InternVL's tiling, against the processors of transformers.

python benchmarks/tiling.py [--photos 10] [--rounds 9]

The photos are those of `preprocess.py`. A round is all photos, one after the other, on one thread. AnyRes has the five
grids of LLaVA-NeXT at 336 px and its thumbnail, InternVL 1 to 12 tiles of 448 px and its thumbnail.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torchvision  # so that both ours and theirs find it loaded
from paired import describe_machine, measure, table
from preprocess import SIZES, on_all, opened, photo
from torch import Tensor
from transformers import GotOcr2ImageProcessor, LlavaNextImageProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiling import Tiler, build_tiler
from vlm_encoders.tiling.pixels import TilePixels


def ours(spec: EncoderSpec, tiler: Tiler) -> Callable[[Any], Tensor]:
    """Give what plans and makes the tiles of one image."""
    pixels = TilePixels(spec)

    def make(image: Any) -> Tensor:
        levels = pixels.load(image)
        made = pixels(levels, tiler.plan(pixels.size(levels)))
        assert isinstance(made, Tensor)
        return made

    return make


def theirs(processor: Any) -> Callable[[Any], Tensor]:
    """Give what makes the tiles of one decoded image."""

    def make(image: Any) -> Tensor:
        made: Tensor = processor(image, return_tensors="pt")["pixel_values"]
        return made[0] if made.ndim == 5 else made

    return make


def compare(title: str, variants: dict[str, Callable[[], list[Tensor]]], spec: EncoderSpec, rounds: int) -> None:
    """Print how far the pixels of each variant are from the first one's, and the times."""
    first, *others = variants
    deviation = torch.tensor(spec.std).view(3, 1, 1) * 255
    apart = []
    for name in others:
        most, two, number = 0.0, 0, 0
        for one, other in zip(variants[name](), variants[first](), strict=True):
            gaps = ((one - other) * deviation).abs()
            most, two, number = max(most, float(gaps.max())), two + int((gaps > 1.5).sum()), number + gaps.numel()
        apart.append(f"{name} {most:.2f} ({two} of {number / 1e6:.1f} million by two)")
    print(f"\n{title}; most levels of 255 from {first}: {', '.join(apart)}\n")
    seconds = measure(variants, rounds, "cpu")
    print(table(seconds, first, {}))
    quicker = []
    for name in (name for name in variants if name.startswith("vlm-encoders")):
        for peer in ("PIL processor", "torchvision processor"):
            ratio = statistics.median(one / other for one, other in zip(seconds[peer], seconds[name], strict=True))
            quicker.append(f"{name} {ratio:.2f} times the {peer}")
    print(f"\n{'; '.join(quicker)}")


def table_of(
    what: str, spec: EncoderSpec, tiler: Tiler, processors: Sequence[Any], images: dict[str, list[Any]], rounds: int
) -> None:
    """Compare from decoded images, from arrays and from JPEG bytes."""
    pil, fast = map(theirs, processors)
    mine = ours(spec, tiler)
    exact = ours(spec.altered(exact_pixels=True), tiler)
    files, decoded, arrays = images["files"], images["decoded"], images["arrays"]
    compare(
        f"{what}, decoded",
        {
            "PIL processor": on_all(pil, decoded),
            "torchvision processor": on_all(fast, decoded),
            "vlm-encoders, PIL image": on_all(mine, decoded),
            "vlm-encoders, array": on_all(mine, arrays),
            "vlm-encoders, exact pixels": on_all(exact, decoded),
        },
        spec,
        rounds,
    )
    compare(
        f"{what}, from JPEG",
        {
            "PIL processor": on_all(lambda data: pil(opened(data)), files),
            "torchvision processor": on_all(lambda data: fast(opened(data)), files),
            "vlm-encoders": on_all(mine, files),
        },
        spec,
        rounds,
    )


def main() -> None:
    """Measure and print four tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=len(SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = [photo(size, seed) for seed, size in enumerate(SIZES[: options.photos])]
    decoded = [opened(data) for data in files]
    images: dict[str, list[Any]] = {
        "files": files,
        "decoded": decoded,
        "arrays": [np.array(image) for image in decoded],
    }
    size = sum(image.width * image.height for image in decoded) / len(files) / 1e6
    print(f"{len(files)} photos of {size:.1f} MP on average; {options.rounds} rounds")
    print(f"{describe_machine('cpu')}, torchvision {torchvision.__version__}")

    clip, anyres = encoder_spec("clip-vit-l-14-336"), build_tiler("llava-next", 336)
    grids = [[rows * 336, columns * 336] for rows, columns in anyres.config()["grids"]]
    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "image_grid_pinpoints": grids}
    pair = LlavaNextImageProcessorPil(**sizes), LlavaNextImageProcessor(**sizes)
    table_of("AnyRes, 336 px", clip, anyres, pair, images, options.rounds)

    vit, internvl = encoder_spec("internvit-300m-14-448"), build_tiler("internvl", 448)
    how = {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "max_patches": 12}
    means = {"image_mean": list(vit.mean), "image_std": list(vit.std)}
    pair = GotOcr2ImageProcessorPil(**how, **means), GotOcr2ImageProcessor(**how, **means)
    table_of("InternVL, 448 px", vit, internvl, pair, images, options.rounds)


if __name__ == "__main__":
    main()
