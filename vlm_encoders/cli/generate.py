"""`vlm-encoders generate`: a saved model answers about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm_encoders.cli.console import quiet_libraries

__all__ = ["generate"]


def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model, such as runs/demo/model.")],
    prompt: Annotated[str, typer.Option(help="The question; <image> marks where a picture stands, else in front.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Picture files, in the order of the question.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Draw the answer instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="Of --sample.")] = 1.0,
    beams: Annotated[int, typer.Option(help="Beams of the search; 1 is greedy.")] = 1,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    llm: Annotated[str | None, typer.Option(help="Where the LLM is now, if not where it was trained.")] = None,
) -> None:
    """Answer a question about pictures with a saved model."""
    quiet_libraries()
    import torch

    from vlm_encoders.vlm.answer import answer
    from vlm_encoders.vlm.checkpoint import load_model
    from vlm_encoders.vlm.processor import VLMProcessor

    loaded = load_model(model, llm=llm)
    processor = VLMProcessor.from_pretrained(model, loaded)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    places = "".join(f"{processor.image_token}\n" for _ in images or [])
    question = prompt if processor.image_token in prompt else places + prompt
    ready = processor.prompt([{"role": "user", "content": question}], images or [])
    torch.manual_seed(seed)
    drawing = {"do_sample": True, "temperature": temperature} if sample else {"do_sample": False}
    (text,) = answer(loaded, processor, [ready], max_new_tokens=max_new_tokens, num_beams=beams, **drawing)
    typer.echo(text)
