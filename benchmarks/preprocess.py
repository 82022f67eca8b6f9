"""JPEG files to normalised pixels: CLIP's crop and LLaVA's pad mode, against the processors of transformers.

python benchmarks/preprocess.py [--side 336] [--photos 10] [--rounds 9]

The photos are made here: smooth scenes of 1 to 4 MP, landscape and portrait, with the grain that gives them the size
of a camera's file (JPEG of quality 90, about 2 bits a pixel). One thread. A round is all photos, one after the other.
"""

from __future__ import annotations

import argparse
import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torchvision  # so that both ours and theirs find it loaded
from paired import describe_machine, measure, table
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from vlm_encoders.preprocess import Preprocessor
from vlm_encoders.registry import encoder_spec
from vlm_encoders.spec import EncoderSpec

SIZES = [
    (960, 1280), (1200, 1600), (1440, 1920), (1500, 2000), (1728, 2304),
    (1080, 1920), (1365, 2048), (1600, 1200), (2000, 1500), (1920, 1280),
]  # fmt: skip
"""(height, width), px: 1.2 to 4.0 MP, three of ten portraits."""


def photo(size: tuple[int, int], seed: int) -> bytes:
    """Make a JPEG file of a smooth scene with some edges and grain."""
    random = np.random.default_rng(seed)
    height, width = size
    coarse = random.integers(0, 256, (height // 48 + 2, width // 48 + 2, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    for _ in range(12):
        top, left = random.integers(0, height - 99), random.integers(0, width - 99)
        scene[top : top + 300, left : left + 400] *= random.uniform(0.5, 1.2)
    scene += random.normal(0, 4.4, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def expand2square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Fill up to a square with a colour, the image in the middle, as LLaVA's function of this name does."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def opened(data: bytes) -> Image.Image:
    """Decode with Pillow."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def on_all(make: Callable[[Any], Tensor], images: Sequence[Any]) -> Callable[[], list[Tensor]]:
    """Give what runs over all images, one after the other."""
    return lambda: [make(image) for image in images]


def compare(title: str, variants: dict[str, Callable[[], list[Tensor]]], spec: EncoderSpec, rounds: int) -> None:
    """Print how far the pixels of each variant are from the first one's, and the times."""
    first, *others = variants
    expected = variants[first]()
    deviation = torch.tensor(spec.std).view(3, 1, 1) * 255
    apart = {}
    for name in others:
        gaps = [((one - two) * deviation).abs() for one, two in zip(variants[name](), expected, strict=True)]
        apart[name] = f"{name} {max(float(gap.max()) for gap in gaps):.2f}"
    print(f"\n{title}; most levels of 255 from {first}: {', '.join(apart.values())}\n")
    print(table(measure(variants, rounds, "cpu"), first, {}))


def main() -> None:
    """Measure and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=336)
    parser.add_argument("--photos", type=int, default=len(SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    side = options.side
    files = [photo(size, seed) for seed, size in enumerate(SIZES[: options.photos])]
    decoded = [opened(data) for data in files]
    pixels = sum(image.width * image.height for image in decoded)
    bits = 8 * sum(map(len, files)) / pixels
    size = pixels / len(files) / 1e6
    print(f"{len(files)} photos of {size:.1f} MP on average, {bits:.1f} bits a pixel, to {side} px")
    print(f"{describe_machine('cpu')}, torchvision {torchvision.__version__}")

    crop = encoder_spec("clip-vit-l-14-336").resized(side)
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    pil, fast = CLIPImageProcessorPil(**sizes), CLIPImageProcessor(**sizes)
    colour = tuple(int(mean * 255) for mean in crop.mean)

    def theirs(processor: Any, image: Any) -> Tensor:
        made: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return made

    def padded(processor: Any, image: Image.Image) -> Tensor:
        return theirs(processor, expand2square(image, colour))

    def ours(preprocess: Preprocessor, image: Any) -> Tensor:
        return preprocess(image)[0]

    by_crop, by_pad = (functools.partial(ours, Preprocessor(replace(crop, resize=how))) for how in ("crop", "expand"))
    compare(
        "CLIP's crop, from JPEG",
        {
            "PIL processor": on_all(lambda data: theirs(pil, opened(data)), files),
            "torchvision processor": on_all(lambda data: theirs(fast, opened(data)), files),
            "vlm-encoders": on_all(by_crop, files),
        },
        crop,
        options.rounds,
    )
    compare(
        "LLaVA's pad mode, from JPEG",
        {
            "expand2square + PIL processor": on_all(lambda data: padded(pil, opened(data)), files),
            "vlm-encoders": on_all(by_pad, files),
        },
        crop,
        options.rounds,
    )
    arrays = [np.array(image) for image in decoded]
    compare(
        "LLaVA's pad mode, decoded",
        {
            "expand2square + PIL processor": on_all(lambda image: padded(pil, image), decoded),
            "vlm-encoders, PIL image": on_all(by_pad, decoded),
            "vlm-encoders, array": on_all(by_pad, arrays),
        },
        crop,
        options.rounds,
    )


if __name__ == "__main__":
    main()
