"""See with two encoders at once, and at two scales: python 06_two_encoders.py [encoder] [encoder].

Without arguments the embedded encoder stands for both, at two sizes of a view. With
`dinov2-vit-l-14 clip-vit-l-14-336` the weights come from the hub, once.
"""

import sys
from tempfile import mkdtemp

from connectors import VlmError
from vlm_encoders import FusedEncoder, MultiScale, create_encoder, encoder_spec, token_budget
from vlm_encoders.tiny import write_dataset

first, second = sys.argv[1:3] if len(sys.argv) > 2 else ("tiny-digits[image_size=128]", "tiny-digits")
picture = next(write_dataset(mkdtemp(), "held_out", 1, seed=0).parent.glob("images/*.png"))

print("by name, before anything is built:")
for name in (
    f"fused:{first}+{second}",
    f"fused[fuse=sequence]:{first}+{second}",
    f"fused[fuse=interleave,grid=8x8]:{first}+{second}",
    f"multiscale[scales=1/2]:{second}",
):
    try:
        row = token_budget(name, "mlp", llm_dim=4096)
        print(f"  {row.total:>5} tokens of width {encoder_spec(name).dim:<5} {name}")
    except VlmError as error:
        print(f"  not so: {error}")

joint = create_encoder(f"fused:{first}+{second}")
visual = joint.encode(picture)
print(f"encoded: tokens {tuple(visual.tokens.shape)}, grid {visual.grid}; {len(joint.blocks())} blocks in all")

built = FusedEncoder([create_encoder("tiny-digits"), MultiScale(create_encoder("tiny-digits"))]).eval()
print(f"of built ones: grid {built.encode(picture).grid}, made again by {built.origin['name']}")
