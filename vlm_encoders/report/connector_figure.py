"""A drawing of what a connector does to the grid, measured from the connector itself.

At the left stand the tokens that come in, at the right those that go out. One of these is
marked, and each that came in is shaded by how much the marked one depends on it: the norm
of the derivative of the one by the other, at initial weights and over random tokens of a
fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from connectors.chain import Chain
from connectors.recipe import build_connector
from connectors.tokens import Grid, TokenSpec, VisualTokens
from vlm_encoders.report.connector_examples import Example

__all__ = ["LEVELS", "Dependence", "draw_connector", "measure_dependence"]

LEVELS = (0.5, 0.1, 0.01, 1e-6)
"""Shares of the strongest dependence from which a token takes a shade, the darkest first."""

_DIM = 8
_CELL = 20
_STEP = 22
_PAD = 14
_ARROW = 86
_LINE = 16
_COLUMNS = 8
_OPACITIES = (1.0, 0.66, 0.4, 0.2)
# Colours that are read on white and on black alike, as a picture cannot ask which page it stands on.
_STYLE = """
text{font:12px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#768390}
.name{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}
.token{fill:#8b949e;fill-opacity:.16;stroke:#8b949e;stroke-opacity:.55}
.from{fill:#e8710a}
.marked{fill:#e8710a;stroke:#768390;stroke-width:2}
.line{fill:none;stroke:#8b949e;stroke-width:1.5}
"""


@dataclass(frozen=True)
class Dependence:
    """How one token that goes out depends on those that come in.

    Attributes:
        came: the tokens that come in.
        went: those that go out.
        marked: the token that goes out, counted from 0.
        shades: of each token that came in, 0 for none to `len(LEVELS)` for the strongest.
        prefix_shades: of each prefix token.
    """

    came: TokenSpec
    went: TokenSpec
    marked: int
    shades: tuple[int, ...]
    prefix_shades: tuple[int, ...]


def measure_dependence(example: Example, seed: int = 0) -> Dependence:
    """Differentiate one token that goes out by all that come in.

    Args:
        example: whose small recipe is built.
        seed: of the tokens and of the initial weights.
    """
    spec = example.small_tokens
    built = build_connector(f"{example.small}+linear", spec, _DIM, seed=seed).eval()
    chain = Chain(*built.connectors[:-1])
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(example.draws, spec.num_tokens, spec.dim, generator=generator).requires_grad_()
    prefix = torch.randn(example.draws, spec.num_prefix, spec.dim, generator=generator).requires_grad_()
    out: VisualTokens = chain(VisualTokens(tokens, spec.grid, prefix if spec.num_prefix else None))
    marked = _middle(out.spec) if example.marked is None else example.marked
    squares = [torch.zeros_like(each[..., 0]) for each in (tokens, prefix)]
    for value in out.tokens[:, marked].sum(0):
        grads = torch.autograd.grad(value, (tokens, prefix), retain_graph=True, allow_unused=True)
        for square, grad in zip(squares, grads, strict=True):
            if grad is not None:
                square.add_(grad.square().sum(-1))
    norms = [square.sqrt().mean(0) for square in squares]
    strongest = torch.cat(norms).max()
    shades, prefix_shades = (_shades(norm / strongest) for norm in norms)
    return Dependence(spec, out.spec, marked, shades, prefix_shades)


def draw_connector(example: Example) -> str:
    """Draw the small recipe of an example as SVG."""
    found = measure_dependence(example)
    left = _Panel(found.came, found.shades, found.prefix_shades)
    marks = [len(LEVELS) + 1 if index == found.marked else 0 for index in range(found.went.num_tokens)]
    right = _Panel(found.went, marks, [0] * found.went.num_prefix)
    title = _wrapped(example.small)
    top = _PAD + _LINE * len(title)
    above = max(left.gap + left.field / 2, right.gap + right.field / 2)
    side = _PAD + left.width
    start = side + _ARROW
    width = max(start + right.width, _words_width(title, 7.3)) + _PAD
    middle = top + _PAD + above
    base = middle + max(left.field, right.field) / 2 + _LINE + 4
    parts = [
        *(_text(_PAD, _PAD - 2 + _LINE * (index + 0.75), line, "name") for index, line in enumerate(title)),
        *left.draw(_PAD, middle),
        f'<path class="line" d="M{side + 22} {middle:g}h{_ARROW - 46}m-7 -5l7 5l-7 5"/>',
        *right.draw(start, middle),
        *left.caption(_PAD, base),
        *right.caption(start, base),
    ]
    bottom = base + _LINE * (max(len(left.words), len(right.words)) - 1) + 8
    told = f"{', '.join(left.words)}; behind {example.small}: {', '.join(right.words)}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {bottom:g}" width="{width:g}" role="img">'
    return "\n".join([head, f"<title>{escape(told)}</title>", f"<style>{_STYLE}</style>", *parts, "</svg>", ""])


class _Panel:
    """Tokens as squares on their grid or as circles without one, prefix tokens in a row above."""

    def __init__(self, spec: TokenSpec, shades: Sequence[int], prefix_shades: Sequence[int]) -> None:
        self.spec, self.shades, self.prefix_shades = spec, shades, prefix_shades
        self.rows, self.columns = spec.grid or _lines(spec.num_tokens)
        self.gap = _STEP + 8 if spec.num_prefix else 0
        self.field = _STEP * self.rows - (_STEP - _CELL)
        place = "without a grid" if spec.grid is None else f"on {self.rows}x{self.columns}"
        self.words = [f"{_some(spec.num_tokens, 'token')} {place}", f"of width {spec.dim}"]
        if spec.num_prefix:
            self.words[1] += f", {_some(spec.num_prefix, 'prefix token')}"
        self.width = max(_row_width(self.columns), _row_width(spec.num_prefix), _words_width(self.words))

    def draw(self, x: float, middle: float) -> list[str]:
        """Draw from `x` on, the tokens of the grid around the height `middle`."""
        y = middle - self.field / 2
        left = x + (self.width - _row_width(self.columns)) / 2
        radius = _CELL / 10 if self.spec.grid else _CELL / 2
        prefix = [
            _token(left + _STEP * index, y - self.gap, shade, _CELL / 4)
            for index, shade in enumerate(self.prefix_shades)
        ]
        places = (divmod(index, self.columns) for index in range(self.spec.num_tokens))
        tokens = [
            _token(left + _STEP * column, y + _STEP * row, shade, radius)
            for (row, column), shade in zip(places, self.shades, strict=True)
        ]
        return [*prefix, *tokens]

    def caption(self, x: float, y: float) -> list[str]:
        """Write what is drawn from `x` on, below it."""
        middle = x + self.width / 2
        return [_text(middle, y + _LINE * index, line, anchor="middle") for index, line in enumerate(self.words)]


def _token(x: float, y: float, shade: int, radius: float) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{_CELL}" height="{_CELL}" rx="{radius:g}"'
    if shade > len(LEVELS):
        return f'<rect class="marked" {place}/>'
    under = f'<rect class="token" {place}/>'
    return under if shade == 0 else f'{under}<rect class="from" {place} fill-opacity="{_OPACITIES[-shade]:g}"/>'


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "") -> str:
    said = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:g}" y="{y:g}"{said}>{escape(words)}</text>'


def _shades(shares: Tensor) -> tuple[int, ...]:
    return tuple(sum(share >= level for level in LEVELS) for share in shares.tolist())


def _middle(spec: TokenSpec) -> int:
    """Choose the token to mark: as near to the middle as there is one, before it."""
    rows, columns = spec.grid or (1, spec.num_tokens)
    return (rows - 1) // 2 * columns + (columns - 1) // 2


def _lines(count: int) -> Grid:
    return -(-count // _COLUMNS), min(count, _COLUMNS)


def _some(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _row_width(count: int) -> int:
    return _STEP * count - (_STEP - _CELL)


def _words_width(words: Iterable[str], letter: float = 6.2) -> float:
    return letter * max(map(len, words))


def _wrapped(recipe: str, longest: int = 44) -> list[str]:
    """Cut a recipe behind commas and before links, so that no line is much longer than the drawing."""
    lines = [""]
    for piece in recipe.replace(",", ",\0").replace("+", "\0+").split("\0"):
        if lines[-1] and len(lines[-1]) + len(piece) > longest:
            lines.append("")
        lines[-1] += piece
    return lines
