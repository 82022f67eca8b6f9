"""Writing scenes as a folder of pictures with LLaVA conversations."""

import json
from pathlib import Path

import numpy as np

from connectors.errors import VlmError
from vlm_encoders.tiny import scenes

CONVERSATIONS_FILE = "conversations.json"


def write_dataset(folder: str | Path, split: scenes.Split, count: int, seed: int) -> Path:
    """Write one picture and one question for each sample, the kinds of question in turn.

    The folder gets `images/*.png` and `conversations.json`, a list of
    `{"id", "image", "conversations": [{"from": "human", ...}, {"from": "gpt", ...}]}`.

    Args:
        folder: Where to write; made if it is not there.
        split: "train" or "held_out": whose digit images are drawn.
        count: How many samples.
        seed: The same seed writes the same files.

    Returns:
        The path of `conversations.json`.

    Raises:
        VlmError: The split has another name, the count is not positive, or scikit-learn is
            not installed.
    """
    if count < 1:
        raise VlmError(f"a dataset of {count} samples was asked for; ask for at least 1")
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        scene = scenes.random_scene(split, rng)
        question = scenes.QUESTIONS[index % len(scenes.QUESTIONS)]
        asked, answer = scenes.ask(question, scene.cells, rng)
        name = f"{split}-{index:05d}"
        scenes.draw(scene).save(images / f"{name}.png")
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
        samples.append({"id": f"{name}-{question}", "image": f"images/{name}.png", "conversations": turns})
    path = images.parent / CONVERSATIONS_FILE
    path.write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    return path
