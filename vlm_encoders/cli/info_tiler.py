"""The card of a tiler, as `vlm-encoders info` prints it."""

from __future__ import annotations

import typer

from vlm_encoders.cli.console import print_card, print_table

__all__ = ["print_tiler"]


def print_tiler(name: str) -> None:
    """Print what is known of a tiler, and its options.

    Raises:
        VlmError: an option is unknown or wrong.
    """
    from vlm_encoders.report.tiler_card import IMAGE_SIZE, tiler_card

    card = tiler_card(name)
    height, width = IMAGE_SIZE
    print_card(
        {
            "name": card.name,
            "class": f"{type(card.tiler).__module__}.{type(card.tiler).__qualname__}",
            "does": card.summary,
            "encoder": card.encoder,
            "connector": card.preset.connector,
            "source": card.preset.source,
            "views": card.views,
            "marks": f"{card.prompt}  of {height}x{width} px; (n) is a run of image tokens" if card.prompt else "none",
        }
    )
    typer.echo("")
    if ":" in name:
        headers = ("option", "here", "default", "meaning")
        rows = [(each.name, each.short_value, each.short_default, each.meaning) for each in card.options]
        print_table(headers, rows)
    else:
        print_table(
            ("option", "default", "meaning"), [(each.name, each.short_default, each.meaning) for each in card.options]
        )
