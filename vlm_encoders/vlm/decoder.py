"""The layers of an LLM, whatever its family calls them."""

from __future__ import annotations

from typing import Any

from torch import nn

from connectors.errors import VlmError
from vlm_encoders.vlm.stages import has_adapter

__all__ = ["decoder_layers"]


def decoder_layers(llm: nn.Module) -> list[nn.Module]:
    """Give the decoder layers of a Hugging Face causal LM, first to last, adapters or not.

    Raises:
        VlmError: it has no list of as many modules as its config has hidden layers.
    """
    inner: Any = llm.get_base_model() if has_adapter(llm) else llm  # type: ignore[operator]
    count = inner.config.get_text_config(decoder=True).num_hidden_layers
    for module in inner.modules():
        # From the outside in, so that experts, of which there may be as many, come later.
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise VlmError(
        f"{type(inner).__name__} has no list of {count} decoder layers, which its config names; use a decoder-only LLM "
        "of transformers"
    )
