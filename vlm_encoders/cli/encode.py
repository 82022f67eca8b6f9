"""`vlm-encoders encode`: images to tokens, a file of them, and a picture of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectors.errors import VlmError
from vlm_encoders.cli.console import print_table, quiet_libraries
from vlm_encoders.cli.values import read_layers, read_size

if TYPE_CHECKING:
    from connectors.tokens import VisualTokens
    from vlm_encoders.report.token_map import TokenColumn

__all__ = ["encode"]


def encode(
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    encoder: Annotated[list[str] | None, typer.Option(help="Encoder name; may be given again.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Local folder or file of weights; 'random' for random ones.")
    ] = None,
    image_size: Annotated[str | None, typer.Option(help="Side or HEIGHTxWIDTH of a view in px.")] = None,
    feature_layer: Annotated[str | None, typer.Option(help="Layer from the end, -1 the last; several: -2,-5.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write tokens (and prefix) to this .safetensors file.")] = None,
    show: Annotated[Path | None, typer.Option(help="Draw pictures beside maps of their tokens.")] = None,
) -> None:
    """Encode pictures and print the tokens' shape; --output keeps the tokens, --show draws them."""
    names = encoder or ["tiny-digits"]
    _check_several(names, weights, output)
    size, layer = read_size(image_size), read_layers(feature_layer)
    _check_first(images, names, size, layer, show)
    quiet_libraries()
    from vlm_encoders.registry import create_encoder
    from vlm_encoders.report.token_map import TokenColumn, draw_token_maps

    pretrained = True if weights is None else False if weights == "random" else weights
    columns = []
    for name in names:
        try:
            model = create_encoder(name, pretrained=pretrained, image_size=size, feature_layer=layer)
        except VlmError as error:
            raise VlmError(str(error).replace("pretrained=False", "--weights random")) from error
        columns.append(TokenColumn(name, model.encode(images), model.spec.resize, model.spec.image_size))
    _print(images, columns)
    if output is not None:
        _write(output, columns[0].visual)
    if show is not None:
        draw_token_maps(images, columns, show)
        typer.echo(f"drawn to {show}")


def _check_first(
    images: list[Path],
    names: list[str],
    size: int | tuple[int, int] | None,
    layer: int | tuple[int, ...] | None,
    show: Path | None,
) -> None:
    """Refuse what cannot come out well before the libraries are loaded and the weights read."""
    from vlm_encoders.preprocess import load_image
    from vlm_encoders.registry import chosen_spec
    from vlm_encoders.report.token_map import check_drawing

    if show is not None:
        check_drawing(show)
    for image in images:
        load_image(image)
    for name in names:
        tokens = chosen_spec(name, image_size=size, feature_layer=layer).token_spec()
        if show is not None and tokens.grid is None:
            raise VlmError(
                f"{name}: its {tokens.num_tokens} tokens have no grid and so no map; leave --show out, or join "
                "encoders by fuse=channel"
            )


def _check_several(names: list[str], weights: str | None, output: Path | None) -> None:
    if len(names) > 1 and output is not None:
        raise VlmError(f"--output holds the tokens of one encoder, got {len(names)}; encode with one at a time")
    if len(names) > 1 and weights not in {None, "random"}:
        raise VlmError(f"--weights {weights} is one place for {len(names)} encoders; encode with one at a time")


def _print(images: list[Path], columns: list[TokenColumn]) -> None:
    rows = []
    for column in columns:
        grid = "none" if column.visual.grid is None else f"{column.visual.grid[0]}x{column.visual.grid[1]}"
        for path, tokens in zip(images, column.visual.tokens.float(), strict=True):
            number, width = tokens.shape
            values = (str(number), grid, str(width), f"{tokens.mean():+.4f}", f"{tokens.std():.4f}")
            rows.append((str(path), column.name, *values))
    headers = ("image", "encoder", "tokens", "grid", "width", "mean", "std")
    print_table(headers, rows, right=(2, 4, 5, 6))
    for column in columns:
        if column.visual.prefix is not None:
            whose = f" by {column.name}" if len(columns) > 1 else ""
            typer.echo(f"and {column.visual.prefix.shape[1]} prefix tokens an image{whose}, kept apart")


def _write(output: Path, visual: VisualTokens) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

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
