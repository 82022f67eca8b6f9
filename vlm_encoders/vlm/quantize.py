"""An LLM held in 4 bits, by bitsandbytes where it is installed."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from connectors.errors import VlmError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Quantize", "is_quantized", "quantization_options"]

Quantize: TypeAlias = Literal["no", "nf4"]


def is_quantized(llm: nn.Module) -> bool:
    """Say whether an LLM holds its weights in 4 or 8 bits."""
    return bool(getattr(llm, "is_quantized", False))


def quantization_options(quantize: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Give what `from_pretrained` takes to hold the linear layers of an LLM in 4 bits.

    Weights are NF4 with doubly quantised constants, which products are computed from in `dtype`;
    embeddings, norms and the head stay as they are.

    Source: QLoRA, arXiv 2305.14314, section 3.

    Args:
        quantize: "no", or "nf4".
        dtype: of the LLM; None for float32.

    Raises:
        VlmError: the kind is unknown, or bitsandbytes is not installed.
    """
    if quantize == "no":
        return {}
    if quantize != "nf4":
        raise VlmError(f"no quantisation '{quantize}'; use 'nf4', or 'no'")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise VlmError(
            "quantize='nf4' needs bitsandbytes, which is not installed; install it, or leave quantize out and use "
            "mode 'lora'"
        )
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.float32,
    )
    return {"quantization_config": config}
