"""Peak memory of one image of 20,000 tiles, by the size of a chunk: it is bounded by the chunk, not by the tiles.

python benchmarks/many_tiles.py [--tiles 2000 20000] [--chunks 640 5120 20480 0]

The encoder is the first two blocks of CLIP ViT-B/32 at 64 px, 5 tokens a tile, with random weights; the connector
averages and maps a tile to one token of width 64. Each row is a process of its own: the peak of resident memory above
what is held before the call, which is weights and the decoded image. Resident memory is the whole process's: allocators
and math libraries are in it. A chunk of 0 tokens stands for all tiles at once.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time

import numpy as np
import torch
from paired import added_memory, describe_machine

from connectors import build_connector
from vlm_encoders import create_encoder, encode_images

SIDE = 64
MIB = 1 << 20


def job(tiles: int, chunk: int) -> tuple[int, float, int]:
    """Encode one image of so many tiles; give bytes of the peak, seconds, and bytes of the result."""
    rows = next(rows for rows in range(math.isqrt(tiles), 0, -1) if tiles % rows == 0)
    size = (rows * SIDE, tiles // rows * SIDE)
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    encoder = create_encoder("clip-vit-b-32", pretrained=False, image_size=SIDE, feature_layer=-11).eval()
    connector = build_connector("avg_pool:factor=2+mlp", encoder.token_spec, 64)

    def run() -> torch.Tensor:
        (tokens,) = encode_images(
            encoder, image, "tiles:thumbnail=false", connector=connector, chunk_tokens=chunk or None
        )
        return tokens

    # What is loaded and made on the first call is not of the tiles.
    encode_images(encoder, image[:640, :640], "tiles", connector=connector, chunk_tokens=640)
    started = time.process_time()
    made: list[torch.Tensor] = []
    peak = added_memory(lambda: made or made.append(run()), "cpu")
    if len(made[0]) != tiles:
        raise SystemExit(f"{tiles} tiles became {len(made[0])} tokens")
    return peak, time.process_time() - started, made[0].nbytes


def main() -> None:
    """Measure each pair of tiles and chunk in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[2000, 20_000])
    parser.add_argument("--chunks", type=int, nargs="+", default=[640, 5120, 20_480, 0])
    parser.add_argument("--job", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        torch.set_num_threads(1)
        print(*job(*options.job))
        return
    print(f"{describe_machine('cpu')}\n")
    print(
        "| tiles | tokens a chunk | peak above image and weights | of it the result | CPU s |\n"
        "|---:|---:|---:|---:|---:|"
    )
    for tiles in options.tiles:
        for chunk in options.chunks:
            arguments = [sys.executable, __file__, "--job", str(tiles), str(chunk)]
            done = subprocess.run(arguments, capture_output=True, text=True, check=True)  # noqa: S603
            peak, seconds, result = map(float, done.stdout.split()[-3:])
            print(
                f"| {tiles} | {chunk or 'all'} | {peak / MIB:.0f} MiB | {result / MIB:.1f} MiB | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
