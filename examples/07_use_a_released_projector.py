"""Take the projector of a released LLaVA file into a model of your own, and write it back.

The file here is written first, with random weights of the embedded parts' widths; with a real
one, `mm_projector.bin` of a LLaVA, nothing below changes but the names of encoder and LLM.
"""

import tempfile
from pathlib import Path

import torch

from connectors import load_released, recipe_of, to_released
from vlm_encoders import build_model
from vlm_encoders.tiny import llm_folder

folder = Path(tempfile.mkdtemp())
parts = {"0.weight": (128, 128), "0.bias": (128,), "2.weight": (128, 128), "2.bias": (128,)}
names = {f"model.mm_projector.{part}": torch.randn(shape) / 12 for part, shape in parts.items()}
torch.save(names, folder / "mm_projector.bin")

released = torch.load(folder / "mm_projector.bin", weights_only=True)
connector = load_released(released)
print("recognised:", recipe_of(connector, 128))

model, processor = build_model("tiny-digits", connector, llm_folder())
for part in model.describe():
    print(part.part, part.module, f"{part.parameters:,}")

back = to_released(connector, "llava")
same = all(torch.equal(back[name], tensor) for name, tensor in released.items())
print("written back under the same names, with the same values:", same and back.keys() == released.keys())
