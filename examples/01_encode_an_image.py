"""Encode a picture with any encoder: python 01_encode_an_image.py [encoder] [picture].

Without arguments it takes the embedded encoder and one of its own pictures. With
`clip-vit-l-14-336 photo.jpg` the weights come from the hub, once.
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

from vlm_encoders import create_encoder
from vlm_encoders.tiny import write_dataset

name = sys.argv[1] if len(sys.argv) > 1 else "tiny-digits"
if len(sys.argv) > 2:
    picture = Path(sys.argv[2])
else:
    picture = next(write_dataset(mkdtemp(), "held_out", 1, seed=0).parent.glob("images/*.png"))

encoder = create_encoder(name)
visual = encoder.encode(picture)

print(f"{name} makes of {picture.name}:")
print(f"  tokens {tuple(visual.tokens.shape)}, grid {visual.grid}, dtype {visual.tokens.dtype}")
print(f"  prefix {None if visual.prefix is None else tuple(visual.prefix.shape)}, kept apart")
print(f"  as a feature map {tuple(visual.as_map().shape)}")
print(f"known before anything was built: {encoder.spec.token_spec()}")
