"""A processor without a model: it counts tokens before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from connectors.errors import VlmError
from vlm_encoders.cost import meta_chain
from vlm_encoders.registry import chosen_spec, encoder_spec
from vlm_encoders.tiling import WholeImage, build_tiler
from vlm_encoders.tiling.layout import TileLayout
from vlm_encoders.vlm.manifest import read_manifest, saved_spec
from vlm_encoders.vlm.processor import VLMProcessor

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["build_processor", "load_tokenizer", "saved_processor"]

_ANY_WIDTH = 64
"""The width of the LLM changes no count."""


def build_processor(
    encoder: str,
    connector: str,
    llm: str | Path,
    *,
    tiler: str | None = None,
    max_length: int | None = None,
    max_image_tokens: int | None = None,
) -> VLMProcessor:
    """Make the processor that `build_model` gives, of the encoder's spec, the connector's shapes and the tokenizer.

    Args:
        encoder: its name.
        connector: its recipe.
        llm: hub id or local folder, of which tokenizer and configuration are read.
        tiler: its name with its options; None for one view an image.
        max_length: longest sample in tokens; None for the LLM's context.
        max_image_tokens: the most tokens that an image may cost, markers included; None for no limit.

    Raises:
        UnknownNameError: a name is not known; the nearest are given.
        VlmError: the parts do not fit each other, or the tokenizer cannot be loaded.
    """
    spec = encoder_spec(encoder)
    cutter = WholeImage(spec.image_size[0]) if tiler is None else build_tiler(tiler, spec)
    chain = meta_chain(connector, cutter.layout.connector_spec(spec.token_spec()), _ANY_WIDTH)
    tokenizer, context = load_tokenizer(llm)
    return VLMProcessor(
        spec,
        chain,
        tokenizer,
        tiler=cutter,
        max_length=max_length or context,
        max_image_tokens=max_image_tokens,
    )


def saved_processor(folder: str | Path) -> VLMProcessor:
    """Read the processor of a saved model without its weights.

    Raises:
        VlmError: the folder holds no model, or one whose parts have no written name.
    """
    manifest = read_manifest(Path(folder))
    encoder, connector = manifest["encoder"], manifest["connector"]
    for part, entry, known in (("encoder", encoder, "origin"), ("connector", connector, "recipe")):
        if not entry[known]:
            raise VlmError(
                f"the {part} of '{folder}' is a '{entry['name']}' that was built by hand, so nothing is known of its "
                "tokens before it is loaded; give --encoder, --connector and --llm in place of --model"
            )
    options = {key: value for key, value in encoder["origin"].items() if key not in {"name", "pretrained", "dtype"}}
    shape = {key: options.pop(key) for key in ("image_size", "feature_layer", "final_norm") if key in options}
    fields = {key: options.pop(key) for key in ("resize", "revision", "exact_pixels") if key in options}
    spec = chosen_spec(encoder["origin"]["name"], **shape, fields=fields, options=options)
    layout = TileLayout.from_config(manifest["layout"])
    chain = meta_chain(connector["recipe"], layout.connector_spec(saved_spec(connector["in_spec"])), _ANY_WIDTH)
    parts = SimpleNamespace(encoder=spec, connector=chain)
    return VLMProcessor.from_pretrained(folder, cast("VisionLanguageModel", parts))


def load_tokenizer(llm: str | Path) -> tuple[Any, int | None]:
    """Load the tokenizer of an LLM, and the length of its context in tokens, None where it has none.

    Args:
        llm: hub id or local folder.

    Raises:
        VlmError: there is none here, and no network to fetch it.
    """
    from transformers import AutoConfig, AutoTokenizer

    place = str(Path(llm).expanduser())
    if Path(place).is_absolute() and not Path(place).is_dir():
        raise VlmError(f"the LLM folder '{place}' does not exist; give a folder with model and tokenizer, or a hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        config = AutoConfig.from_pretrained(place).get_text_config()
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
        raise VlmError(
            f"the tokenizer of the LLM '{llm}' cannot be loaded ({first}); give a folder with model and tokenizer, "
            "a hub id, or set HF_HOME to a cache that holds it"
        ) from error
    return tokenizer, getattr(config, "max_position_embeddings", None)
