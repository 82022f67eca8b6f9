"""`vlm-encoders tiles`: how tilers cut a picture, drawn over it, and what each costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectors.errors import VlmError
from vlm_encoders.cli.console import print_table
from vlm_encoders.cli.values import preset_of, read_image_size

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlm_encoders.report.tile_words import TilePanel

__all__ = ["tiles"]

TILERS = ("llava-next", "internvl")
GREY = (160, 160, 160)


def tiles(
    photo: Annotated[Path | None, typer.Argument(help="Picture file.")] = None,
    tiler: Annotated[
        list[str] | None,
        typer.Option(help="Tiler with its options, such as internvl:max_tiles=6; may be given again."),
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder name; else the one a tiler was released with.")] = None,
    connector: Annotated[str | None, typer.Option(help="Connector recipe; else the released one.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens that the picture may cost, marks included.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in px, in place of a picture.")] = None,
    out: Annotated[Path, typer.Option("--output", "--out", help="Draw to this .png, .svg, .pdf or .jpg file.")] = Path(
        "tiles.png"
    ),
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Print the table alone.")] = False,
    prompt: Annotated[bool, typer.Option("--prompt", help="Print marks and runs of image tokens in order.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw how tilers cut a picture, with what each costs; no weights are loaded, nothing is downloaded."""
    image_size = read_image_size(photo, size)
    if image_size is None:
        raise VlmError("there is nothing to cut; give a picture file, or --size HEIGHTxWIDTH")
    if not no_picture:
        _check_out(out, photo)
    panels = [_plan(name, encoder, connector, image_size, max_tokens) for name in tiler or TILERS]
    if as_json:
        typer.echo(json.dumps([_as_dict(panel, prompt=prompt) for panel in panels], indent=2))
    else:
        _print(panels)
        if prompt:
            _print_prompts(panels)
    if not no_picture:
        from vlm_encoders.report.tile_figure import draw_tiles

        draw_tiles(_picture(photo, image_size), panels, out)
        # On stderr, so that a pipe gets the table or the JSON alone.
        typer.echo(f"drawn to {out}", err=True)


def _plan(
    name: str, encoder: str | None, connector: str | None, image_size: tuple[int, int], max_tokens: int | None
) -> TilePanel:
    from vlm_encoders.budget import image_counts
    from vlm_encoders.registry import encoder_spec
    from vlm_encoders.report.tile_words import TilePanel
    from vlm_encoders.tiling import build_tiler

    preset = preset_of(name)
    spec = preset.spec() if encoder is None else encoder_spec(encoder)
    recipe = connector or preset.connector
    counts = image_counts(spec, recipe, build_tiler(name, spec))
    return TilePanel(name, recipe, counts, counts.plan(image_size, max_tokens))


def _picture(photo: Path | None, image_size: tuple[int, int]) -> Image:
    if photo is not None:
        from vlm_encoders.preprocess import load_image

        return load_image(photo)
    from PIL import Image

    # A plain picture need not be large.
    height, width = (min(side, 8) for side in image_size)
    return Image.new("RGB", (width, height), GREY)


def _check_out(out: Path, photo: Path | None) -> None:
    from vlm_encoders.report.token_map import check_drawing

    if photo is not None and out.resolve() == photo.resolve():
        raise VlmError(f"the drawing would be written over the picture '{photo}'; give another --out")
    check_drawing(out)


def _print(panels: list[TilePanel]) -> None:
    headers = ("tiler", "image", "views", "grid", "per view", "image tokens", "marks", "total")
    rows = []
    for panel in panels:
        plan, tokens = panel.plan, panel.image_tokens
        grid = "-" if plan.grid is None else f"{plan.grid[0]}x{plan.grid[1]}"
        numbers = (str(tokens), str(panel.markers), str(tokens + panel.markers))
        per_view = "/".join(map(str, panel.view_tokens))
        image = f"{plan.image_size[0]}x{plan.image_size[1]}"
        rows.append((panel.name, image, str(plan.num_views), grid, per_view, *numbers))
    print_table(headers, rows, right=(2, 4, 5, 6, 7))


def _print_prompts(panels: list[TilePanel]) -> None:
    from vlm_encoders.report.tile_words import short_prompt

    typer.echo("")
    print_table(("tiler", "prompt"), [(panel.name, short_prompt(panel.pieces)) for panel in panels])


def _as_dict(panel: TilePanel, *, prompt: bool) -> dict[str, Any]:
    plan = panel.plan
    told: dict[str, Any] = {
        "tiler": panel.name,
        "encoder": panel.counts.encoder.name,
        "connector": panel.connector,
        "image_size": plan.image_size,
        "views": plan.num_views,
        "grid": plan.grid,
        "pages": [
            {"grid": page.grid, "view": page.view, "content": page.content, "tokens_per_view": tokens}
            for page, tokens in zip(plan.pages, panel.page_tokens, strict=True)
        ],
        "image_tokens": panel.image_tokens,
        "marks": panel.markers,
        "total": panel.image_tokens + panel.markers,
    }
    return told | ({"prompt": panel.pieces} if prompt else {})
