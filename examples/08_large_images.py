"""Plan, count, cut and encode a large image: python 08_large_images.py [picture].

Planning and counting know sizes alone: no pixel is read and no weight is loaded. The encoder at the
end, of native resolution, starts from random weights, so nothing is downloaded either.
"""

import sys

import torch
from PIL import Image

from connectors import build_connector
from vlm_encoders import create_encoder, token_budget
from vlm_encoders.tiling import PRESETS, build_tiler
from vlm_encoders.tiling.pixels import TilePixels

picture = Image.open(sys.argv[1]) if len(sys.argv) > 1 else Image.linear_gradient("L").resize((1920, 1080))
picture = picture.convert("RGB")
size = picture.height, picture.width

print(f"1. an image of {size[0]}x{size[1]} px, as a plan")
plan = build_tiler("internvl").plan(size)
print(
    f"   {plan.num_views} views: {plan.grid[0]}x{plan.grid[1]} tiles of {plan.tile_size} px, thumbnail {plan.thumbnail}"
)

print("2. what it costs the LLM, freely and within 1000 image tokens")
for name in ("llava-next", "internvl", "idefics3", "qwen2-vl", "pixtral"):
    preset = PRESETS[name]
    free = token_budget(preset.spec(), preset.connector, tiler=name, image_size=size)
    bound = token_budget(preset.spec(), preset.connector, tiler=name, image_size=size, max_tokens=1000)
    print(
        f"   {name:<12}{free.views:>4} views {free.total:>6} tokens, or {bound.views:>3} views {bound.total:>5} tokens"
    )

print("3. cut into the views that the plan says")
tiles = build_tiler("internvl").cut(picture, plan)
print(f"   {len(tiles)} pictures of {tiles[0].height}x{tiles[0].width} px")

print("4. images of three sizes in one pack, through an encoder of native resolution")
encoder = create_encoder("siglip2-naflex-b-16", pretrained=False)
tiler, pixels = build_tiler("naflex:max_patches=64", encoder.spec), TilePixels(encoder.spec)
images = [picture, picture.resize((300, 900)), picture.resize((40, 40))]
views = [view for image in images for view in pixels(image, tiler.plan((image.height, image.width)))]
with torch.no_grad():
    packed = encoder.forward_packed(views)
    for_llm = build_connector("mlp", encoder.token_spec, 512).forward_packed(packed)
print(f"   grids {packed.grids}: tokens {tuple(packed.tokens.shape)}, for the LLM {tuple(for_llm.tokens.shape)}")
