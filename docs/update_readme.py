"""Write the README's generated parts again: `python docs/update_readme.py`; the tests hold them to be current.

`docs/demo-output.txt` is what `vlm-encoders demo` printed; benchmark results are quoted from `benchmarks/README.md`.
"""

import re
from pathlib import Path

from vlm_encoders import encoder_spec, list_encoders

ROOT = Path(__file__).parent.parent


def encoders() -> str:
    """Write the table of registered encoders."""
    lines = [
        "| encoder | view, px | tokens | grid | prefix | width | layer | library |",
        "|---|---|---:|---|---:|---:|---|---|",
    ]
    for name in list_encoders():
        spec = encoder_spec(name)
        tokens = spec.token_spec()
        rows, columns = tokens.grid or (0, 0)
        layer = f"{spec.feature_layer}{', normed' if spec.final_norm else ''}"
        cells = (f"`{name}`", spec.image_size[0], tokens.num_tokens, f"{rows}x{columns}", tokens.num_prefix, tokens.dim)
        lines.append(f"| {' | '.join(map(str, cells))} | {layer} | {spec.backend} |")
    return "\n".join(lines)


def demo() -> str:
    """Quote what the demo printed, without the progress of its training."""
    text = (ROOT / "docs" / "demo-output.txt").read_text(encoding="utf-8").strip()
    return "```text\n" + re.sub(r"^step \d+/.*\n", "", text, flags=re.MULTILINE) + "\n```"


def benchmarks() -> str:
    """Quote the results that stand in the benchmarks' own README."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    return text.split("<!-- results -->")[1].split("<!-- /results -->")[0].strip()


def updated(readme: str) -> str:
    """Give the README with its generated parts as they should be."""
    for part in (encoders, demo, benchmarks):
        name = part.__name__
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, rest = readme.split(begin)
        readme = f"{head}{begin}\n{part()}\n{end}{rest.split(end)[1]}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
