"""Plug an encoder into an LLM and ask about a picture: python 03_plug_into_llava.py [encoder] [recipe] [llm].

The parts default to the embedded ones. The connector is new here, so the answer means
nothing yet: example 04 trains it.
"""

import sys
from tempfile import mkdtemp

from vlm_encoders import STAGE_1, answer, apply_stage, build_model
from vlm_encoders.tiny import llm_folder, write_dataset

defaults = ["tiny-digits", "pixel_shuffle:factor=2+mlp", str(llm_folder())]
encoder, recipe, llm = sys.argv[1:] + defaults[len(sys.argv) - 1 :]
model, processor = build_model(encoder, recipe, llm)
apply_stage(model, STAGE_1)

for row in model.describe():
    rate = "" if row.lr is None else f"lr {row.lr:g}"
    print(f"{row.part:<10}{row.module:<34}{row.trainable:>9,} of {row.parameters:>12,} train  {row.mode} {rate}")

picture = next(write_dataset(mkdtemp(), "held_out", 1, seed=0).parent.glob("images/*.png"))
question = {"role": "user", "content": "<image>\nWhich digits do you see, in reading order?"}
prompt = processor.prompt([question], [picture])
print(f"the image takes {processor.num_image_tokens((64, 64))} of the prompt's {len(prompt.input_ids)} tokens")
print("answer before training:", answer(model, processor, [prompt], max_new_tokens=12)[0] or "(nothing)")
