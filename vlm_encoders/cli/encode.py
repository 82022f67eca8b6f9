"""`vlm-encoders encode`: images to tokens, and a file of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_encoders.cli.console import print_table, quiet_libraries

if TYPE_CHECKING:
    from connectors.tokens import VisualTokens

__all__ = ["encode"]


def encode(
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    encoder: Annotated[str, typer.Option(help="Encoder name.")] = "tiny-digits",
    weights: Annotated[
        str | None, typer.Option(help="Local folder or file of weights; 'random' for random ones.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of a view in px.")] = None,
    feature_layer: Annotated[int | None, typer.Option(help="Block from the end, -1 the last.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write tokens (and prefix) to this .safetensors file.")] = None,
) -> None:
    """Encode pictures and print the tokens' shape; --output keeps the tokens."""
    quiet_libraries()
    from vlm_encoders.registry import create_encoder

    pretrained = True if weights is None else False if weights == "random" else weights
    model = create_encoder(encoder, pretrained=pretrained, image_size=image_size, feature_layer=feature_layer).eval()
    visual = model.encode(images)
    grid = "none" if visual.grid is None else f"{visual.grid[0]}x{visual.grid[1]}"
    rows = [
        (str(path), str(tokens.shape[0]), grid, str(tokens.shape[1]), f"{tokens.mean():+.4f}", f"{tokens.std():.4f}")
        for path, tokens in zip(images, visual.tokens, strict=True)
    ]
    print_table(("image", "tokens", "grid", "width", "mean", "std"), rows, right=(1, 3, 4, 5))
    if visual.prefix is not None:
        typer.echo(f"and {visual.prefix.shape[1]} prefix tokens an image, kept apart")
    if output is not None:
        _write(output, visual)


def _write(output: Path, visual: VisualTokens) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from connectors.errors import VlmError

    tensors = {"tokens": visual.tokens.contiguous()}
    if visual.prefix is not None:
        tensors["prefix"] = visual.prefix.contiguous()
    try:
        save_file(tensors, output)
    except (OSError, SafetensorError) as error:
        raise VlmError(
            f"cannot write '{output}': {error}; give a file in a folder that exists and has space"
        ) from error
    typer.echo(f"written to {output}")
