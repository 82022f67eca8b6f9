"""`vlm-encoders info`: the card of one encoder."""

from __future__ import annotations

from typing import Annotated

import typer

from vlm_encoders.cli.console import count

__all__ = ["info"]


def info(
    name: Annotated[str, typer.Argument(help="Encoder name, or timm:..., open_clip:..., hf:...")],
    image_size: Annotated[int | None, typer.Option(help="Side of a view in px, other than the native one.")] = None,
) -> None:
    """Print what is known of an encoder; nothing is downloaded or built."""
    from vlm_encoders.registry import encoder_spec

    spec = encoder_spec(name)
    if image_size is not None:
        spec = spec.resized(image_size)
    tokens = spec.token_spec()
    grid = "" if tokens.grid is None else f", a grid of {tokens.grid[0]} rows by {tokens.grid[1]} columns"
    layer = f"{spec.feature_layer} of {spec.num_layers} blocks ({spec.kept_layers} are built)"
    card = {
        "name": spec.name,
        "family": spec.family,
        "built by": f"{spec.backend}: {spec.source}",
        "weights": spec.weights or "none released; pretrained=False or a folder",
        "licence": spec.licence or "unknown",
        "view": f"{spec.image_size[0]}x{spec.image_size[1]} px, {spec.resize}, {spec.interpolation}",
        "mean, std": f"{spec.mean}, {spec.std}",
        "tokens": f"{tokens.num_tokens} of width {tokens.dim}{grid}",
        "prefix": f"{tokens.num_prefix} tokens, kept apart",
        "feature layer": f"{layer}, {'with' if spec.final_norm else 'without'} the final norm",
        "parameters": count(spec.parameters) if spec.parameters else "unknown before building",
        "source": spec.reference or "unknown",
    }
    for key, value in card.items():
        typer.echo(f"{key + ':':<15}{value}")
