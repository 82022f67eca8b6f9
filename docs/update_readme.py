"""Write the README's generated parts again: `python docs/update_readme.py`; the tests hold them to be current.

`docs/demo-output.txt`, `docs/stages-output.txt` and `docs/compare-output.txt` are what `vlm-encoders demo`, `demo
--stages` and `compare` printed; `python docs/update_readme.py --stages` trains the two stages again and draws
`docs/stages.svg`. Benchmark results are quoted from `benchmarks/README.md`.
Figures of connectors are measured from the connectors themselves. `python docs/update_readme.py --keys` adds new ones
to `tests/data/connector_keys.json` too, the keys that checkpoints hold; those that stand there are left as they are.
`python docs/update_readme.py --tiles` draws `docs/tiles.png`, over a page of scikit-learn's digits.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from connectors import TokenSpec, build_connector, list_connectors
from connectors.activations import ACTIVATIONS
from connectors.blocks import ON_ODD
from connectors.norms import NORMS
from connectors.released import released_layouts
from connectors.resize import RESIZE_MODES
from vlm_encoders import encoder_spec, list_encoders, token_budget
from vlm_encoders.budget import image_counts
from vlm_encoders.cli.console import count
from vlm_encoders.cli.info_stage import part_words, rates
from vlm_encoders.cli.list import tiler_words
from vlm_encoders.report.connector_card import ConnectorCard, connector_card
from vlm_encoders.report.connector_examples import ENCODER, LLM_DIM, VIEW, connector_example
from vlm_encoders.report.connector_figure import draw_connector
from vlm_encoders.report.tile_figure import draw_tiles
from vlm_encoders.report.tile_words import TilePanel, short_prompt
from vlm_encoders.report.tiler_card import IMAGE_SIZE, TilerCard, tiler_card
from vlm_encoders.tiling import PRESETS, build_tiler
from vlm_encoders.vlm.published import PUBLISHED

IMAGE_SIZES = ((480, 640), (1080, 1920), (20000, 300))
DRAWN = ("llava-next", "internvl", "idefics3", "llava-uhd", "s2", "qwen2-vl")
ROOT = Path(__file__).parent.parent


def encoders() -> str:
    """Write one row a family: what its members cost, and who builds them."""
    lines = [
        "| family | names | view, px | tokens | width | library | such as |",
        "|---|---:|---|---|---|---|---|",
    ]
    for family in sorted({encoder_spec(name).family for name in list_encoders()}):
        names = list_encoders(family=family)
        specs = [encoder_spec(name) for name in names]
        cells = (
            family,
            str(len(names)),
            _range(spec.image_size[0] for spec in specs),
            _range(spec.token_spec().num_tokens for spec in specs),
            _range(spec.dim for spec in specs),
            ", ".join(sorted({spec.backend for spec in specs})),
            f"`{names[len(names) // 2]}`",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def all_encoders() -> str:
    """Write the page with every registered encoder."""
    lines = [
        "# Encoders",
        "",
        "Written by `python docs/update_readme.py`. The feature layer is counted from the end; tokens are those of one",
        "view, without the prefix. `vlm-encoders info NAME` says more of each.",
        "",
        "| encoder | family | view, px | tokens | grid | prefix | width | layer | parameters | licence | library |",
        "|---|---|---|---:|---|---:|---:|---|---:|---|---|",
    ]
    for name in sorted(list_encoders(), key=lambda name: (encoder_spec(name).family, name)):
        spec = encoder_spec(name)
        tokens = spec.token_spec()
        rows, columns = tokens.grid or (0, 0)
        layer = f"{spec.feature_layer}{', normed' if spec.final_norm else ''}"
        shape = (tokens.num_tokens, f"{rows}x{columns}", tokens.num_prefix, tokens.dim, layer)
        rest = (*shape, f"{spec.parameters:,}", spec.licence, spec.backend)
        cells = (f"`{name}`", spec.family, spec.image_size[0], *rest)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def connectors() -> str:
    """Write one row a connector: what its example costs; names lead to the page."""
    lines = [
        "| connector | for example | tokens | parameters | FLOPs | of mlp's |",
        "|---|---|---:|---:|---:|---:|",
    ]
    mlp = connector_card("mlp")
    for name in list_connectors():
        card = connector_card(name)
        of_mlp = f"{card.flops / mlp.flops:.2f}"
        numbers = (str(card.out.num_tokens), count(card.parameters), count(card.flops), of_mlp)
        cells = (f"[{name}](docs/connectors.md#{name})", f"`{card.example.recipe}`", *numbers)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def connector_page() -> str:
    """Write the page with every connector."""
    cards = [connector_card(name) for name in list_connectors()]
    other = [f"`{card.name}` takes a view of {_view(card)}." for card in cards if card.example.tokens != VIEW]
    without = [f"`{card.name}`" for card in cards if card.own_parameters == 0]
    head = _PAGE_HEAD.format(
        table=connectors().replace("docs/connectors.md#", "#"),
        other="\n".join(other),
        without=", ".join(without),
        activations=_words(ACTIVATIONS),
        norms=_words(NORMS),
        on_odd=_words(ON_ODD),
        modes=_words(RESIZE_MODES),
    )
    return head + "\n".join(map(_connector_section, cards)) + _RELEASED.format(table=released_table())


def released_table() -> str:
    """Write one row a layout of released weights."""
    lines = ["| layout | models | names as in | asked for | may be told |", "|---|---|---|---|---|"]
    for name, layout in released_layouts().items():
        asked = [f"`{key}={hint.usual!r}`" for key, hint in layout.hints.items() if hint.asked]
        told = [f"`{key}={hint.usual!r}`" for key, hint in layout.hints.items() if not hint.asked]
        cells = (f"`{name}`", layout.used_by, layout.source, ", ".join(asked), ", ".join(told))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def connector_figures() -> dict[str, str]:
    """Draw every connector; the file of each below docs/connectors is its name with .svg."""
    return {name: draw_connector(connector_example(name)) for name in list_connectors()}


def connector_keys(known: dict[str, Any]) -> dict[str, Any]:
    """Add connectors that are not in `known` yet: a small recipe, its tokens, and the state dict's keys and shapes."""
    found = dict(known)
    for name in sorted(set(list_connectors()) - known.keys()):
        example = connector_example(name)
        spec = example.small_tokens
        with torch.device("meta"):
            # Behind it stands linear, so that any width can end the chain.
            chain = build_connector(f"{example.small}+linear", spec, 8)
        shapes = {key: list(tensor.shape) for key, tensor in chain.state_dict().items()}
        found[name] = {"recipe": f"{example.small}+linear", "grid": spec.grid, "dim": spec.dim, "keys": shapes}
    return dict(sorted(found.items()))


def _connector_section(card: ConnectorCard) -> str:
    spec, example, out = card.example.tokens, card.example, card.out
    grid = "no grid" if out.grid is None else f"a {out.grid[0]}x{out.grid[1]} grid"
    own = "none" if card.own_parameters == 0 else f"{card.own_parameters:,}"
    view = "" if spec == VIEW else f" of {_view(card)}"
    lines = [
        f"## {card.name}",
        "",
        f"{card.summary}. Choose it {card.cls.choose}.",
        "",
        f"![{card.name}: which tokens one token that goes out depends on](connectors/{card.name}.svg)",
        "",
        f"- For example `{example.recipe}`{view}: {out.num_tokens} tokens on {grid}, {card.parameters:,} parameters",
        f"  ({own} in `{card.name}`), {count(card.flops)} FLOPs.",
        f"- Used by: {card.cls.used_by}." if card.cls.used_by else "- Used by no released model that we know of.",
        f"- Source: {card.cls.source}.",
        "",
        "```python",
        f'build_connector("{example.recipe}", {_written(spec)}, {LLM_DIM})',
        "```",
        "",
    ]
    if card.options:
        lines += ["| option | default | meaning |", "|---|---|---|"]
        for option in card.options:
            default = f"`{option.default}`" if option.default else f"({option.kind})"
            lines.append(f"| `{option.name}` | {default} | {option.meaning} |")
        lines.append("")
    return "\n".join(lines)


def _view(card: ConnectorCard) -> str:
    rows, columns = card.example.tokens.grid or (1, card.example.tokens.num_tokens)
    return f"{card.example.encoder}, {rows}x{columns} tokens of width {card.example.tokens.dim}"


def _written(spec: TokenSpec) -> str:
    prefix = f", {spec.num_prefix}" if spec.num_prefix else ""
    return f"TokenSpec({spec.num_tokens}, {spec.dim}, {spec.grid}{prefix})"


def tilers() -> str:
    """Write one row a tiler: what it was released with, and what images of some sizes cost there."""
    sizes = [f"{height}x{width}" for height, width in IMAGE_SIZES]
    lines = [
        f"| tiler | what it does | encoder and connector | {' | '.join(sizes)} |",
        f"|---|---|---|{'---:|' * len(sizes)}",
    ]
    for preset in dict.fromkeys(PRESETS.values()):
        spec = preset.spec()
        name = next(name for name, other in PRESETS.items() if other == preset)
        budgets = [token_budget(spec, preset.connector, tiler=name, image_size=size) for size in IMAGE_SIZES]
        costs = [f"{each.total:,}{f' + {each.markers}' if each.markers else ''} ({each.views})" for each in budgets]
        side = "" if preset.image_size is None else f" at {preset.image_size} px"
        names = ", ".join(f"[{each}]({preset.source})" for each, other in PRESETS.items() if other == preset)
        cells = (names, tiler_words(preset), f"`{preset.encoder}`{side}, `{preset.connector}`", *costs)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tiler_page() -> str:
    """Write the page with every tiler."""
    return _TILERS_HEAD + "\n".join(_tiler_section(tiler_card(name)) for name in PRESETS)


def _tiler_section(card: TilerCard) -> str:
    spec = card.preset.spec()
    counts = image_counts(spec, card.preset.connector, build_tiler(card.name, spec))
    plan = counts.plan(IMAGE_SIZE)
    views = f"{plan.num_views} view{'s' * (plan.num_views != 1)}"
    size = f"{IMAGE_SIZE[0]}x{IMAGE_SIZE[1]} px"
    side = card.encoder.removeprefix(card.preset.encoder)
    lines = [
        f"## {card.name}",
        "",
        f"{card.summary}.",
        "",
        f"- Encoder `{card.preset.encoder}`{side}, connector `{card.preset.connector}`.",
        f"- Views: {card.views}. {size} are {counts.total(plan):,} image tokens in {views}.",
        f"- Marks: `{short_prompt(counts.pieces(plan))}`." if card.prompt else "- Marks: none.",
        f"- Source: {card.preset.source}.",
        "",
        "| option | default | meaning |",
        "|---|---|---|",
    ]
    # A bar would end the cell, in code as well.
    rows = [(f"`{each.name}`", f"`{each.short_default}`", each.meaning.replace("|", "\\|")) for each in card.options]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def draw_tiles_picture() -> None:
    """Draw some tilers over a page of digits."""
    page = digit_page()
    panels = []
    for name in DRAWN:
        preset = PRESETS[name]
        counts = image_counts(preset.spec(), preset.connector, build_tiler(name, preset.spec()))
        panels.append(TilePanel(name, preset.connector, counts, counts.plan((page.height, page.width))))
    path = ROOT / "docs" / "tiles.png"
    draw_tiles(page, panels, path)
    # A few colours do, and take a tenth of the bytes.
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def digit_page(rows: int = 4, columns: int = 7, cell: int = 270) -> Image.Image:
    """Draw a page of handwritten digits on paper that darkens downwards."""
    from vlm_encoders.tiny.scenes import digit_images

    ink = digit_images()[0][: rows * columns] / 16
    page = np.zeros((rows * cell, columns * cell, 3))
    for place, digit in enumerate(ink):
        row, column = divmod(place, columns)
        drawn = np.asarray(Image.fromarray(np.uint8(255 * digit)).resize((cell, cell), Image.Resampling.BICUBIC)) / 255
        paper = np.array((0.86, 0.89, 0.92)) - 0.06 * row
        colour = np.array((0.36, 0.52, 0.68)) + 0.2 * np.array((column / columns, 0, -column / columns))
        tinted = paper + (colour - paper) * drawn[..., None]
        page[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = tinted
    return Image.fromarray(np.uint8(255 * page.clip(0, 1)))


def conformance() -> str:
    """Quote the counts of docs/conformance.md."""
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    return text.split("# Conformance")[1].strip()


def demo() -> str:
    """Quote what the demo printed, without the progress of its training."""
    text = (ROOT / "docs" / "demo-output.txt").read_text(encoding="utf-8").strip()
    return "```text\n" + re.sub(r"^step \d+/.*\n", "", text, flags=re.MULTILINE) + "\n```"


def compare() -> str:
    """Quote what the comparison printed."""
    return "```text\n" + (ROOT / "docs" / "compare-output.txt").read_text(encoding="utf-8").strip() + "\n```"


def benchmarks() -> str:
    """Quote the results against what users run today; the benchmarks' own README has the others too."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    results = text.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    tower, training = results.split("Against the bare library:")[0], results.split("Training:")[1]
    return f"{tower.strip()}\n\n{training.strip()}"


def two_stages() -> str:
    """Quote what `vlm-encoders demo --stages` printed."""
    text = (ROOT / "docs" / "stages-output.txt").read_text(encoding="utf-8").strip()
    return f"```text\n{text}\n```"


def train_both_stages() -> None:
    """Train the embedded Stage 1 and Stage 2 again, and keep what the command printed and drew."""
    command = [sys.executable, "-m", "vlm_encoders", "demo", "--stages"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)  # noqa: S603 - our own
    (ROOT / "docs" / "stages-output.txt").write_text(f"$ vlm-encoders demo --stages\n{done.stdout}", encoding="utf-8")
    shutil.copyfile(ROOT / "runs" / "demo" / "stages.svg", ROOT / "docs" / "stages.svg")


def stages() -> str:
    """Write one row a stage: what it trains, at which rates, and where that stands."""
    lines = ["| stage | encoder | connector | LLM | learning rates | source |", "|---|---|---|---|---|---|"]
    for stage in PUBLISHED.values():
        cells = (f"`{stage.name}`", *part_words(stage.policy), rates(stage.policy), _linked(stage.source))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def training_page(page: str) -> str:
    """Give the page on training with its table of stages as it should be."""
    return _with(page, stages)


def updated(readme: str) -> str:
    """Give the README with its generated parts as they should be."""
    for part in (encoders, demo, benchmarks, conformance, connectors, compare, tilers, two_stages):
        readme = _with(readme, part)
    return readme


def _with(page: str, part: Callable[[], str]) -> str:
    name = part.__name__
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, rest = page.split(begin)
    return f"{head}{begin}\n{part()}\n{end}{rest.split(end)[1]}"


def _linked(source: str) -> str:
    """Shorten what a source says to links: a paper by its number, code by its file."""
    words = []
    for each in source.split("; "):
        place, _, rest = each.partition(" (")
        if place.startswith("arXiv "):
            number, _, section = place.removeprefix("arXiv ").partition(", ")
            words.append(f"[{number}](https://arxiv.org/abs/{number}){', ' + section if section else ''}")
        else:
            words.append(f"[{place.rpartition('/')[2]}]({place}){' (' + rest if rest else ''}")
    return "; ".join(words)


def _words(known: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in known)


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


_PAGE_HEAD = f"""# Connectors

Written by `python docs/update_readme.py`: every number and figure is measured from the code. Examples take a view of
`{ENCODER}` (24x24 tokens of width {VIEW.dim}, {VIEW.num_prefix} prefix token) to an LLM of width {LLM_DIM}, but
for those named below. Parameters and FLOPs are those of the whole recipe, for one view. A FLOP is one addition or
multiplication, in float32; matrix products and convolutions are counted, norms and softmax are not. In half precision
the Q-Formers make keys and values, which float32 spares: 17.4G and 17.7G in place of 12.2G and 12.5G.

{{table}}

{{other}}

## How to choose

- Begin with `mlp`: every token stays, in its place, and the last column compares with it.
- Tokens are what the LLM pays for. For fewer and wider ones that hold every number, fold them (`pixel_shuffle`, or
  `patch_merger` with its own MLP); for fewer of one width, pool or convolve (`avg_pool`, `max_pool`, `resize`, `conv`,
  `pooled_projector`, `ldp`, `ldp_v2`, `c_abstractor`). All of these keep a grid, which layouts of tiles need.
- `qformer`, `perceiver`, `flamingo` and `instruct_qformer` give as many tokens as they have queries, whatever comes in;
  `tome` as many as asked for. None of these has a grid.
- `token_packer` reads several layers of one encoder, `sva` several encoders. With `matryoshka` the number of tokens is
  chosen when the model runs.
- `norm`, `position`, `residual` and `keep_prefix` are links that stand with others; CLS and registers reach the LLM
  only by the last.
- Without a parameter of their own: {{without}}.
- A grid that blocks do not divide is refused, with what `on_odd=pad`, `crop` and `resize` would give.
- `matryoshka` stands at its first level; `connectors.choose_level(model, 4)` chooses another, in a chain or a whole
  model. Processor and loader count tokens when they are made, so make them anew then.

Words that options take: `activation` {{activations}}; `norm` and `kind` {{norms}}; `on_odd` {{on_odd}}; `mode` of
`resize` {{modes}}. A default in brackets is a kind: the value follows from the tokens or the LLM.

In the figures one token that goes out is marked. Those that came in are shaded by how much it depends on them: the norm
of its derivative, at fresh weights, the mean over random tokens, against the strongest. Grey is none. Squares have a
place on a grid, circles have none; prefix tokens stand above.

"""

_TILERS_HEAD = f"""# Tilers

Written by `python docs/update_readme.py`; `vlm-encoders info internvl:max_tiles=6` prints the card of one. A tiler is
written as its name, or with options behind it: `internvl:max_tiles=6,thumbnail=false`, several grids or numbers as
`llava-next:grids=1x2/2x1` and `s2:scales=1/2`, no value as `tiles:max_tiles=none`. Defaults are those with the encoder
named; with another one `tile_size` and `patch` follow that encoder, unless they are written.

- Marks are text around an image and between its views, shown for {IMAGE_SIZE[0]}x{IMAGE_SIZE[1]} px with the number of
  image tokens of each run in brackets. The tokenizer must have each mark such as `<img>` or `[IMG_END]` as one token,
  else it is refused; add it, or leave the marks out by `:markers=false`. Commas and line breaks are text as any other.
- A budget, `max_tokens`, counts image tokens and marks: the tiler takes its best plan within it, or says the least that
  the image needs. `budget` and `tiles --max-tokens` show it, `build_model(max_image_tokens=)` keeps to it.
- Tilers of native resolution give views of sizes of their own, for encoders that pack them. A connector that joins
  tokens, such as `patch_merger` or `pixel_shuffle:factor=2`, needs views of whole blocks: write as many as it joins of
  a side, `naflex:merge=2`.

"""

_RELEASED = """
## Released weights

`load_released(state_dict)` recognises these, in a whole checkpoint or in the connector's part, and
`to_released(chain, layout)` writes them back. What the weights do not tell is asked for, as in
`load_released(state_dict, heads=12)`; the table has the values of the released models.

{table}
"""


if __name__ == "__main__":
    (ROOT / "docs" / "encoders.md").write_text(all_encoders(), encoding="utf-8")
    (ROOT / "docs" / "tilers.md").write_text(tiler_page(), encoding="utf-8")
    (ROOT / "docs" / "connectors.md").write_text(connector_page(), encoding="utf-8")
    for drawn, svg in connector_figures().items():
        (ROOT / "docs" / "connectors" / f"{drawn}.svg").write_text(svg, encoding="utf-8")
    if "--keys" in sys.argv:
        keys = ROOT / "tests" / "data" / "connector_keys.json"
        text = json.dumps(
            connector_keys(json.loads(keys.read_text(encoding="utf-8")) if keys.exists() else {}), indent=1
        )
        # A shape stays on its line.
        text = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
        keys.write_text(f"{text}\n", encoding="utf-8")
    if "--stages" in sys.argv:
        train_both_stages()
    if "--tiles" in sys.argv:
        draw_tiles_picture()
    path = ROOT / "docs" / "training.md"
    path.write_text(training_page(path.read_text(encoding="utf-8")), encoding="utf-8")
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
