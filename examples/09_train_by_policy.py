"""Policies for each part, two encoders of one joint apart, and a run that proves them: python 09_train_by_policy.py.

The second encoder trains its last block, the first stays as it is, the LLM takes DoRA adapters.
"""

import argparse

from vlm_encoders import ConversationDataset, PartPolicy, StagePolicy, TrainConfig, Trainer, apply_stage, build_model
from vlm_encoders.tiny import llm_folder, write_dataset

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--output", default="runs/by-policy")
options = parser.parse_args()

data = write_dataset(f"{options.output}/data", "train", 16 * options.steps, seed=1)
model, processor = build_model("fused:tiny-digits+tiny-digits", "mlp", llm_folder())
policy = StagePolicy(
    "by-policy",
    encoder=(PartPolicy(), PartPolicy("train", lr=1e-4, last_blocks=1)),
    connector=PartPolicy("train", lr=3e-3, weight_decay=0.01),
    llm=PartPolicy("dora", lr=5e-4, lora_rank=8),
)
apply_stage(model, policy)

config = TrainConfig(
    data=str(data),
    output=f"{options.output}/train",
    stage=policy.name,
    steps=options.steps,
    batch_size=4,
    pack_tokens=4 * 90,  # four packs of about four samples each, in place of padding
    gradient_checkpointing=True,
    tracker="none",
)
trainer = Trainer(model, processor, ConversationDataset(data, None, processor), config, on_build=print)
result = trainer.fit()
print(f"loss {result.losses[0]:.2f} -> {result.losses[-1]:.2f}; moved: {result.moved}")
trainer.save_pretrained(f"{options.output}/model")
