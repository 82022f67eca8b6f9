"""Stage 1: train the projector alone, encoder and LLM frozen: python 04_train_projector_stage1.py [--steps N].

The embedded encoder, LLM and handwritten digits stand where yours will; `data` is an
ordinary LLaVA conversation file. 400 steps take about a minute and a half on two cores.
"""

import argparse

from vlm_encoders import (
    STAGE_1,
    ConversationDataset,
    TrainConfig,
    Trainer,
    apply_stage,
    build_model,
    exact_match,
)
from vlm_encoders.tiny import llm_folder, write_dataset

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--output", default="runs/stage1")
options = parser.parse_args()

train = write_dataset(f"{options.output}/data/train", "train", min(6000, 32 * options.steps), seed=1)
held_out = write_dataset(f"{options.output}/data/held_out", "held_out", 96, seed=2)

model, processor = build_model("tiny-digits", "mlp", llm_folder())
apply_stage(model, STAGE_1)

config = TrainConfig(
    data=str(train),
    image_folder=str(train.parent),
    output=f"{options.output}/train",
    steps=options.steps,
    batch_size=32,
    learning_rate=3e-3,
)
unseen = ConversationDataset(held_out, held_out.parent, processor)
before = exact_match(model, processor, unseen, batch_size=48).accuracy
result = Trainer(model, processor, ConversationDataset(train, train.parent, processor), config).fit()
after = exact_match(model, processor, unseen, batch_size=48).accuracy

print("trained", ", ".join(part for part, moved in result.moved.items() if moved))
print(f"loss {result.losses[0]:.2f} -> {result.losses[-1]:.2f}, exact match {before:.0%} -> {after:.0%}")
model.save_pretrained(f"{options.output}/model")
processor.save_pretrained(f"{options.output}/model")
