"""A model and its processor from four names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectors.base import Connector
from connectors.errors import VlmError
from connectors.recipe import build_connector, parse_recipe
from vlm_encoders.encoder import Encoder
from vlm_encoders.registry import create_encoder, encoder_spec
from vlm_encoders.tiling import Tiler, WholeImage, build_tiler
from vlm_encoders.vlm.model import VisionLanguageModel
from vlm_encoders.vlm.processor import VLMProcessor
from vlm_encoders.vlm.quantize import Quantize, quantization_options

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["build_model", "load_llm"]


def build_model(
    encoder: str | Encoder,
    connector: str | Connector,
    llm: str | Path,
    *,
    tiler: str | Tiler | None = None,
    pretrained: bool | str | Path = True,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    max_image_tokens: int | None = None,
    chunk_tokens: int | None = None,
    seed: int = 0,
    quantize: Quantize = "no",
) -> tuple[VisionLanguageModel, VLMProcessor]:
    """Plug an encoder into an LLM: the model in eval mode, and the processor that feeds it.

    Args:
        encoder: as `create_encoder` takes it, or an encoder that is there already, with its
            weights: `pretrained` and `dtype` do not touch it.
        connector: a recipe, such as `pixel_shuffle:factor=2+mlp`, or a connector that is there
            already, such as one of `load_released`; that one itself becomes the model's, cast to
            float32, so that models which are given the same one share its weights.
        llm: hub id or local folder of a causal LM with its tokenizer.
        tiler: a tiler's name with its options, such as `internvl:max_tiles=6`, or a tiler; None for one
            view an image.
        pretrained: the encoder's weights, as `create_encoder` takes it.
        dtype: of encoder and LLM, None for float32; the connector is float32 whatever they are.
        max_length: longest sample in tokens; None for the LLM's context.
        max_image_tokens: the most tokens that an image may cost, markers included; None for no limit.
        chunk_tokens: the most tokens that the encoder sees at once; see `VisionLanguageModel`.
        seed: of the connector's initial weights; the global generator has no part in them.
        quantize: "nf4" to hold the LLM in 4 bits, for a stage of mode "qlora"; needs bitsandbytes.

    Raises:
        UnknownNameError: a name is not known; the nearest are given.
        VlmError: the parts do not fit each other, or cannot be loaded.
    """
    # What leads nowhere is told before gigabytes are read.
    quantization_options(quantize, dtype)
    spec = encoder.spec if isinstance(encoder, Encoder) else encoder_spec(encoder)
    if not (tiler is None or isinstance(tiler, (str, Tiler))):
        raise VlmError(f"a tiler is a name such as llava-next, or a Tiler, got {type(tiler).__name__}")
    cutter = build_tiler(tiler, spec) if isinstance(tiler, str) else tiler or WholeImage(spec.image_size[0])
    tokens = cutter.layout.connector_spec(spec.token_spec())
    if isinstance(connector, str):
        parse_recipe(connector)
    elif isinstance(connector, Connector):
        connector.out_spec(tokens)
    else:
        raise VlmError(
            f"a connector is a recipe or a Connector, got {type(connector).__name__}; write a recipe such as mlp, or "
            "make one of released weights by load_released"
        )
    language_model, tokenizer = load_llm(llm, dtype, quantize)
    vision = encoder if isinstance(encoder, Encoder) else create_encoder(encoder, pretrained=pretrained, dtype=dtype)
    width = language_model.get_input_embeddings().embedding_dim  # type: ignore[operator]
    if isinstance(connector, str):
        chain: Connector = build_connector(connector, tokens, width, seed=seed)
    else:
        chain = connector.float()
    context = getattr(language_model.config, "max_position_embeddings", None)
    processor = VLMProcessor(
        vision,
        chain,
        tokenizer,
        tiler=cutter,
        max_length=max_length or context,
        max_image_tokens=max_image_tokens,
    )
    model = VisionLanguageModel(
        vision,
        chain,
        language_model,
        image_token_id=processor.image_token_id,
        layout=processor.layout,
        chunk_tokens=chunk_tokens,
    )
    return model.eval(), processor


def load_llm(source: str | Path, dtype: torch.dtype | None = None, quantize: Quantize = "no") -> tuple[nn.Module, Any]:
    """Load a causal LM and its tokenizer from the hub, its cache, or a folder.

    Args:
        source: hub id or local folder.
        dtype: of the parameters; None for float32.
        quantize: "nf4" to hold the linear layers in 4 bits, "no" as they are.

    Raises:
        VlmError: there is no such model here and no network to fetch it, it lacks weights, or
            bitsandbytes is asked for and not installed.
    """
    options = quantization_options(quantize, dtype)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = str(Path(source).expanduser())
    if Path(place).is_absolute() and not Path(place).is_dir():
        raise VlmError(f"the LLM folder '{place}' does not exist; give a folder with model and tokenizer, or a hub id")
    what = "tokenizer"
    try:
        # First what is small: a folder without it is refused before gigabytes are read.
        tokenizer = AutoTokenizer.from_pretrained(place)
        what = "model"
        llm, report = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype or torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
        raise VlmError(
            f"the {what} of the LLM '{source}' cannot be loaded ({first}); give a folder with model and tokenizer, "
            "a hub id, or set HF_HOME to a cache that holds it"
        ) from error
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise VlmError(
            f"the weights of the LLM '{source}' lack {len(lacking)} tensors, such as {lacking[0]}, which would be "
            "random; give a checkpoint of a causal LM"
        )
    loaded: nn.Module = llm
    return loaded, tokenizer
