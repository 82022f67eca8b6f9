"""Hold every name that can be given to the contract of encoders, and write down how many keep it.

python docs/conformance.py [--sample 40] [--only timm|open_clip|transformers] [--jobs 2] [--resume]

Each encoder is built without memory on the meta device, so its size does not matter. The whole run takes about
45 minutes on two cores and writes docs/conformance.md; a sample writes nothing. Outcomes are kept in
runs/conformance.jsonl, from which `--resume` goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTCOMES = ROOT / "runs" / "conformance.jsonl"
CONFIGURATIONS = ROOT / "tests" / "data" / "transformers_configurations.json"
WHAT = {
    "timm": "every model of `timm.list_models()`",
    "open_clip": "every architecture of `open_clip.list_models()`",
    "transformers": "released configurations of transformers' vision classes",
}


# Their recurrence is unrolled step by step on the meta device: 20 s for a view.
ON_CPU = ("timm:sequencer2d_l", "timm:sequencer2d_m", "timm:sequencer2d_s")


def names(library: str, folder: Path) -> list[str]:
    """Give the encoder names of a library; transformers' configurations are written to `folder`."""
    if library == "timm":
        import timm

        return [f"timm:{name}" for name in timm.list_models()]
    if library == "open_clip":
        import open_clip

        return [f"open_clip:{arch}" for arch in open_clip.list_models()]
    found = []
    for number, row in enumerate(json.loads(CONFIGURATIONS.read_text(encoding="utf-8"))):
        place = folder / f"{number:03}-{row['source']}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(row["config"]), encoding="utf-8")
        found.append(f"hf:{place}")
    return found


def start_worker() -> None:
    """Leave initial values out: a third of the time, and nothing on the meta device."""
    import timm.layers.weight_init
    import torch

    torch.set_num_threads(1)
    timm.layers.weight_init._trunc_normal_ = lambda tensor, *_, **__: tensor
    for name in ("trunc_normal_", "normal_", "uniform_", "xavier_uniform_", "kaiming_normal_", "kaiming_uniform_"):
        setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)


def check(name: str) -> tuple[str, str]:
    """Check one encoder; give its name, and what is wrong with it or an empty string."""
    from vlm_encoders.testing import check_encoder

    warnings.simplefilter("ignore")
    try:
        check_encoder(name, device="cpu" if name in ON_CPU else "meta")
    except Exception as error:  # noqa: BLE001 - each library fails in its own ways, and all of them are counted
        return name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return name, ""


def run(todo: list[str], jobs: int) -> Iterator[tuple[str, str]]:
    """Check all names in fresh processes, in no fixed order, keep each outcome, and say how far it is."""
    started = time.monotonic()
    OUTCOMES.parent.mkdir(exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(jobs, start_worker, maxtasksperchild=300) as pool, OUTCOMES.open("a", encoding="utf-8") as file:
        for number, result in enumerate(pool.imap_unordered(check, todo), 1):
            file.write(json.dumps(result) + "\n")
            file.flush()
            yield result
            if number % 100 == 0 or number == len(todo):
                print(f"{number} of {len(todo)} after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def report(results: dict[str, dict[str, str]]) -> str:
    """Write the table of counts and each exception with its reason."""
    lines = ["| library | what | names | keep the contract |", "|---|---|---:|---:|"]
    failures = []
    for library, outcome in results.items():
        wrong = {name: reason for name, reason in outcome.items() if reason}
        lines.append(f"| {library} | {WHAT[library]} | {len(outcome)} | {len(outcome) - len(wrong)} |")
        failures += [f"- `{name}`: {reason}" for name, reason in sorted(wrong.items())]
    return "\n".join([*lines, "", "Exceptions:" if failures else "There are no exceptions.", *failures])


def main() -> int:
    """Check, print the report, and write it if everything was checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=0, help="about this many names of each library; 0 for all")
    parser.add_argument("--only", choices=sorted(WHAT), default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on behind the outcomes of the last run")
    options = parser.parse_args()
    if not options.resume:
        OUTCOMES.unlink(missing_ok=True)
    kept = dict(json.loads(line) for line in OUTCOMES.read_text().splitlines()) if OUTCOMES.exists() else {}
    results: dict[str, dict[str, str]] = {}
    for library in WHAT:
        if options.only in {None, library}:
            known = names(library, OUTCOMES.parent / "configurations")
            known = known[:: max(1, len(known) // options.sample) if options.sample else 1]
            outcome = {name: kept[name] for name in known if name in kept}
            outcome.update(run([name for name in known if name not in kept], options.jobs))
            results[library] = {name.replace(f"{ROOT}/", ""): reason for name, reason in outcome.items()}
    text = report(results)
    print(text)
    if not options.sample and options.only is None:
        import open_clip
        import timm
        import transformers

        versions = (
            f"timm {timm.__version__}, open_clip {open_clip.__version__}, transformers {transformers.__version__}"
        )
        head = f"Written by `make conformance` on {time.strftime('%Y-%m-%d')}: {versions}."
        page = f"# Conformance\n\n{head}\n\n{text}\n"
        (ROOT / "docs" / "conformance.md").write_text(page, encoding="utf-8")
    return 1 if any(reason for outcome in results.values() for reason in outcome.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
