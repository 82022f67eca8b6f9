"""Compare what an image costs the LLM, before anything is downloaded: python 02_compare_token_budgets.py [HxW].

Every count is the one that processor and model use, so it is also what you will get.
"""

import sys

from vlm_encoders import token_budget

height, width = (int(side) for side in (sys.argv[1] if len(sys.argv) > 1 else "480x640").split("x"))
choices = [
    ("clip-vit-l-14-336", "mlp", "whole"),
    ("clip-vit-l-14-336", "mlp", "anyres"),
    ("clip-vit-l-14-336", "pixel_shuffle:factor=2+mlp", "whole"),
    ("siglip-so400m-14-384", "mlp", "whole"),
    ("siglip-so400m-14-384", "pixel_shuffle:factor=3+mlp", "anyres"),
    ("dinov2-vit-l-14", "avg_pool:factor=2+mlp", "whole"),
    ("sam-vit-b", "avg_pool:grid=16x16+mlp", "whole"),
    ("clip-vit-l-14", "keep_prefix+qformer+linear", "whole"),
]

print(f"an image of {height}x{width} px, an LLM of width 4096")
print(f"{'encoder':<22}{'connector':<30}{'tiler':<8}{'views':>6}{'tokens':>8}{'trained':>10}{'embeddings':>12}")
for encoder, connector, tiler in choices:
    row = token_budget(encoder, connector, tiler=tiler, image_size=(height, width), llm_dim=4096)
    print(
        f"{encoder:<22}{connector:<30}{tiler:<8}{row.views:>6}{row.total:>8}"
        f"{row.connector_parameters / 1e6:>9.1f}M{row.embedding_bytes / 2**20:>9.1f} MiB"
    )
