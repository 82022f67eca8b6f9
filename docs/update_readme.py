"""Write the README's generated parts again: `python docs/update_readme.py`; the tests hold them to be current.

`docs/demo-output.txt` is what `vlm-encoders demo` printed; benchmark results are quoted from `benchmarks/README.md`.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from vlm_encoders import encoder_spec, list_encoders

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


def conformance() -> str:
    """Quote the counts of docs/conformance.md."""
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    return text.split("# Conformance")[1].strip()


def demo() -> str:
    """Quote what the demo printed, without the progress of its training."""
    text = (ROOT / "docs" / "demo-output.txt").read_text(encoding="utf-8").strip()
    return "```text\n" + re.sub(r"^step \d+/.*\n", "", text, flags=re.MULTILINE) + "\n```"


def benchmarks() -> str:
    """Quote the results against what users run today; the benchmarks' own README has the others too."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    results = text.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    tower, training = results.split("Against the bare library:")[0], results.split("Training:")[1]
    return f"{tower.strip()}\n\n{training.strip()}"


def updated(readme: str) -> str:
    """Give the README with its generated parts as they should be."""
    for part in (encoders, demo, benchmarks, conformance):
        name = part.__name__
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, rest = readme.split(begin)
        readme = f"{head}{begin}\n{part()}\n{end}{rest.split(end)[1]}"
    return readme


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


if __name__ == "__main__":
    (ROOT / "docs" / "encoders.md").write_text(all_encoders(), encoding="utf-8")
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
