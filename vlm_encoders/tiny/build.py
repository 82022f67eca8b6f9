"""Makes the embedded weights: `python -m vlm_encoders.tiny.build`.

Two processes of one thread each train the ViT and the Llama side by side, with fixed
seeds, a fixed number of steps and deterministic kernels: the same versions on the same
kind of processor give the same files.
"""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vlm_encoders.tiny.weights_folder import weights_folder

SEED = 0
FIGURES_FILE = "figures.json"
THREADS = 1
LIBRARIES = ("torch", "timm", "transformers", "tokenizers", "scikit-learn", "numpy", "pillow")


def _timed(train: Callable[..., dict[str, float]], folder: Path, recipe: Any) -> dict[str, Any]:
    import torch

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    start = time.monotonic()
    figures = train(folder, recipe, SEED)
    return {**figures, "seconds": round(time.monotonic() - start), "recipe": asdict(recipe)}


def file_sha256(folder: Path) -> dict[str, str]:
    """Give the SHA-256 of every weight, config and tokenizer file below a folder."""
    files = sorted(path for part in ("encoder", "llm") for path in (folder / part).iterdir())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def build(folder: Path) -> dict[str, Any]:
    """Train both networks into a folder and write their figures beside them."""
    from vlm_encoders.tiny.llm_pretrain import LlmRecipe, train_llm
    from vlm_encoders.tiny.vit_pretrain import VitRecipe, train_vit

    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        encoder: Future[dict[str, Any]] = pool.submit(_timed, train_vit, folder / "encoder", VitRecipe())
        llm: Future[dict[str, Any]] = pool.submit(_timed, train_llm, folder / "llm", LlmRecipe())
        figures: dict[str, Any] = {"encoder": encoder.result(), "llm": llm.result()}
    figures |= {
        "seed": SEED,
        "seconds": round(time.monotonic() - start),
        "processes": 2,
        "threads_each": THREADS,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "sha256": file_sha256(folder),
    }
    (folder / FIGURES_FILE).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    print(json.dumps(build(Path(sys.argv[1]) if len(sys.argv) > 1 else weights_folder()), indent=2))
