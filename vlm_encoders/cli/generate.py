"""`vlm-encoders generate`: a saved model answers about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectors.errors import VlmError
from vlm_encoders.cli.console import quiet_libraries

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["generate"]


def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model, such as runs/demo/model.")],
    prompt: Annotated[str, typer.Option(help="The question; <image> marks where a picture stands, else in front.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Picture files, in the order of the question.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Draw the answer instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="Of --sample, above 0.")] = 1.0,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")] = 1,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    max_image_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens that a picture may cost.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens that the encoder sees at once.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder name, if its folder is not where it was.")] = None,
    llm: Annotated[str | None, typer.Option(help="Where the LLM is now; 'tiny' for the embedded one.")] = None,
) -> None:
    """Answer a question about pictures with a saved model."""
    if not temperature > 0:
        raise VlmError(
            f"the temperature must be above 0, got {temperature:g}; for the likeliest answer leave out --sample"
        )
    quiet_libraries()
    import torch

    from vlm_encoders.vlm.answer import answer
    from vlm_encoders.vlm.processor import VLMProcessor

    loaded = _load(model, encoder, llm)
    loaded.chunk_tokens = chunk_tokens
    processor = VLMProcessor.from_pretrained(model, loaded)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    places = "".join(f"{processor.image_token}\n" for _ in images or [])
    question = prompt if processor.image_token in prompt else places + prompt
    ready = processor.prompt([{"role": "user", "content": question}], images or [], max_tokens=max_image_tokens)
    torch.manual_seed(seed)
    drawing = {"do_sample": True, "temperature": temperature} if sample else {"do_sample": False}
    (text,) = answer(loaded, processor, [ready], max_new_tokens=max_new_tokens, num_beams=beams, **drawing)
    typer.echo(text)


def _load(folder: Path, encoder: str | None, llm: str | None) -> VisionLanguageModel:
    from vlm_encoders.registry import create_encoder
    from vlm_encoders.tiny import llm_folder
    from vlm_encoders.vlm.checkpoint import load_model
    from vlm_encoders.vlm.manifest import read_manifest

    given = None
    if encoder is not None:
        entry = read_manifest(folder)["encoder"]
        # Where its weights lie in the checkpoint, none are fetched.
        where = {"name": encoder, "dtype": entry["dtype"], "pretrained": not entry["saved"]}
        given = create_encoder(**((entry["origin"] or {}) | where))
    try:
        return load_model(folder, encoder=given, llm=str(llm_folder()) if llm == "tiny" else llm)
    except VlmError as error:
        told = str(error).replace("pass llm=", "give --llm").replace("pass encoder=", "give --encoder")
        raise VlmError(told) from error
