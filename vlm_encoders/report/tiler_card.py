"""What is known of a tiler: its options, what it was released with, and the text that it writes; torch stays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from connectors.tokens import TokenSpec
from vlm_encoders.report.docstring import class_meanings
from vlm_encoders.report.tile_words import short_prompt
from vlm_encoders.tiling import PRESETS, Tiler, build_tiler
from vlm_encoders.tiling.layout import Piece
from vlm_encoders.tiling.plan import Size, TilePlan
from vlm_encoders.tiling.presets import Preset

__all__ = ["IMAGE_SIZE", "TilerCard", "TilerOption", "tiler_card"]

IMAGE_SIZE: Size = (480, 640)
"""(height, width) in px of the image whose prompt is shown."""

_LONGEST = 40
_SIDE = 8


@dataclass(frozen=True)
class TilerOption:
    """One option of a tiler.

    Attributes:
        name: as it is written behind the tiler's name.
        default: of the preset with its own encoder, as it is written there.
        value: what was asked for, the default without; as it is written.
        meaning: from the docstring of the class, or of a parent.
    """

    name: str
    default: str
    value: str
    meaning: str

    @property
    def short_default(self) -> str:
        """The default, the middle of a long list of grids left out."""
        return _short(self.default)

    @property
    def short_value(self) -> str:
        """The value, shortened in the same way."""
        return _short(self.value)


@dataclass(frozen=True)
class TilerCard:
    """What is known of one tiler.

    Attributes:
        name: as it was asked for, with its options.
        preset: what it was released with.
        tiler: the tiler itself.
        summary: the first line of its class's docstring.
        options: in order.
        prompt: of an image of `IMAGE_SIZE`, (n) for a run of image tokens; "" where no mark is written.
    """

    name: str
    preset: Preset
    tiler: Tiler
    summary: str
    options: tuple[TilerOption, ...]
    prompt: str

    @property
    def encoder(self) -> str:
        """The released encoder, and its side in px where it is resized."""
        size = self.preset.image_size
        return self.preset.encoder if size is None else f"{self.preset.encoder} at {size} px"

    @property
    def views(self) -> str:
        """How many views an image becomes, and whether they have sizes of their own."""
        most = self.tiler.max_views
        number = "as many as the image asks for" if most is None else "1" if most == 1 else f"at most {most}"
        return f"{number}, of sizes of their own: native resolution" if self.tiler.native else number


def tiler_card(name: str) -> TilerCard:
    """Read what is known of a tiler, `internvl` or with options `internvl:max_tiles=6`; nothing is built or measured.

    Raises:
        UnknownNameError: no tiler has this name.
        VlmError: an option is unknown or wrong.
    """
    known = name.partition(":")[0].strip()
    if known not in PRESETS:
        build_tiler(known)
    preset = PRESETS[known]
    spec = preset.spec()
    plain, tiler = build_tiler(known, spec), build_tiler(name, spec)
    return TilerCard(
        name=name,
        preset=preset,
        tiler=tiler,
        summary=(preset.tiler.__doc__ or "").partition("\n")[0].rstrip("."),
        options=tuple(_options(plain, tiler)),
        prompt=_prompt(tiler),
    )


def _options(plain: Tiler, tiler: Tiler) -> list[TilerOption]:
    hints, said = get_type_hints(type(tiler)), class_meanings(type(tiler))
    return [
        TilerOption(
            name=field.name,
            default=_written(getattr(plain, field.name), hints[field.name]),
            value=_written(getattr(tiler, field.name), hints[field.name]),
            meaning=said.get(field.name, ""),
        )
        for field in fields(tiler)
        if field.init
    ]


def _prompt(tiler: Tiler) -> str:
    if not tiler.layout.markers:
        return ""
    plan = tiler.plan(IMAGE_SIZE)
    pieces = tiler.layout.pieces(plan, _tokens(tiler, plan))
    shown: list[Piece] = ["(n)" if isinstance(piece, int) else piece for piece in pieces]
    return short_prompt(shown)


def _tokens(tiler: Tiler, plan: TilePlan) -> TokenSpec | Sequence[TokenSpec]:
    """Give tokens of each page, which tell the text alone: only marked rows depend on them, those of native views."""
    step = tiler.view_step
    if step is None:
        return TokenSpec(_SIDE * _SIDE, 1, (_SIDE, _SIDE))
    grids = [(page.view[0] // step, page.view[1] // step) for page in plan.pages]
    return [TokenSpec(rows * columns, 1, (rows, columns)) for rows, columns in grids]


def _written(value: Any, hint: Any) -> str:
    """Write a value as an option has it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, tuple):
        return str(value)
    if get_args(hint)[-1] is not Ellipsis:
        return "x".join(map(str, value))
    return "/".join("x".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in value)


def _short(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    parts = text.split("/")
    return f"{'/'.join(parts[:3])}/.../{parts[-1]} ({len(parts)})"
