"""Where the embedded weights lie."""

from importlib.resources import files
from pathlib import Path


def weights_folder() -> Path:
    """Give the folder with the embedded weights, their figures and their README."""
    return Path(str(files("vlm_encoders.tiny"))) / "weights"


def encoder_folder() -> Path:
    """Give the embedded ViT as a timm folder, for `timm.create_model("local-dir:...")`."""
    return weights_folder() / "encoder"


def llm_folder() -> Path:
    """Give the embedded Llama and its tokenizer as a transformers folder."""
    return weights_folder() / "llm"
