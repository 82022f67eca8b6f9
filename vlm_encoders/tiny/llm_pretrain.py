"""Pre-training of the embedded Llama on text alone: lines of cell words, then the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vlm_encoders.tiny import scenes
from vlm_encoders.tiny.tokenizer import CELL_WORDS, build_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class LlmRecipe:
    """How long and how hard the LLM is trained."""

    steps: int = 3000
    batch: int = 16
    lr: float = 1.5e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    word_noise: float = 0.03


def build_llm(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """Build the untrained Llama: 4 layers of width 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def spell(cells: Sequence[int], side: int, noise: float, rng: np.random.Generator) -> str:
    """Write the cells as a grid of words, each cell as side x side words, some of them wrong."""
    board = np.reshape(cells, (scenes.ROWS, scenes.COLUMNS)).repeat(side, 0).repeat(side, 1).ravel() + 1
    wrong = rng.random(board.shape) < noise
    board[wrong] = rng.integers(0, len(CELL_WORDS), int(wrong.sum()))
    return " ".join(CELL_WORDS[index] for index in board)


def conversation(
    rng: np.random.Generator, *, side: int, noise: float, questions: Sequence[scenes.Question]
) -> list[dict[str, str]]:
    """Write a conversation about random cells; their words stand where an image will stand."""
    cells = scenes.random_cells(rng)
    messages = []
    # A second question about the same row would be answered by copying.
    for asked, answer in dict.fromkeys(scenes.ask(question, cells, rng) for question in questions):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    messages[0]["content"] = f"{spell(cells, side, noise, rng)}\n{messages[0]['content']}"
    return messages


def _exact_match(llm: "LlamaForCausalLM", encoded: dict[str, Tensor]) -> float:
    """Give the share of conversations of which every answer token is the most likely one."""
    with torch.no_grad():
        logits = llm(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    right = logits[:, :-1].argmax(-1) == encoded["input_ids"][:, 1:]
    matches = (right | (encoded["assistant_masks"][:, 1:] == 0)).all(1)
    return float(matches.float().mean())


class _Text:
    """Writes, renders and encodes conversations by the tokenizer's own chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", rng: np.random.Generator) -> None:
        self.tokenizer = tokenizer
        self.rng = rng

    def batch(
        self, count: int, *, side: int, noise: float, questions: Sequence[scenes.Question] | None = None
    ) -> dict[str, Any]:
        """Encode conversations; without questions given, all of them in random order, rows several times."""
        rng = self.rng
        encoded: dict[str, Any] = self.tokenizer.apply_chat_template(
            [
                conversation(
                    rng,
                    side=side,
                    noise=noise,
                    questions=questions or rng.permutation([*scenes.QUESTIONS, "row", "row"]).tolist(),
                )
                for _ in range(count)
            ],
            return_dict=True,
            return_assistant_tokens_mask=True,
            padding=True,
            return_tensors="pt",
        )
        return encoded


def text_accuracy(llm: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", *, seed: int) -> dict[str, float]:
    """Measure exact answers on fresh text without noise, per question and words of an image."""
    text = _Text(tokenizer, np.random.default_rng(seed))
    figures = {}
    for question in scenes.QUESTIONS:
        for side in (1, 2):
            encoded = text.batch(1000, side=side, noise=0.0, questions=[question])
            words = side * side * scenes.ROWS * scenes.COLUMNS
            figures[f"{question}_{words}_words"] = _exact_match(llm, encoded)
    return figures


def train_llm(folder: Path, recipe: LlmRecipe, seed: int) -> dict[str, float]:
    """Train the LLM on text and save it in fp16, with its tokenizer, as a transformers folder.

    Returns:
        The parameter count and the text figures of the saved weights.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    llm = build_llm(tokenizer)
    optimizer = torch.optim.AdamW(llm.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, recipe.steps, pct_start=recipe.warmup, cycle_momentum=False
    )
    rng = np.random.default_rng(seed)
    text = _Text(tokenizer, rng)
    for step in range(recipe.steps):
        side = int(rng.integers(1, 3))
        # One wrong word of four can be outvoted; the only word of a cell cannot.
        encoded = text.batch(recipe.batch, side=side, noise=recipe.word_noise if side > 1 else 0.0)
        labels = encoded["input_ids"].masked_fill(encoded["assistant_masks"] == 0, -100)
        loss = llm(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"llm step {step + 1}/{recipe.steps} loss {loss.item():.3f}", flush=True)
    llm.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {"parameters": saved.num_parameters(), **text_accuracy(saved, tokenizer, seed=seed + 1)}
