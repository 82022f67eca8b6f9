"""`vlm-encoders info`: the card of one encoder, connector, tiler or stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from connectors.errors import UnknownNameError, VlmError
from vlm_encoders.cli.console import count, print_card
from vlm_encoders.cli.info_stage import print_stage
from vlm_encoders.cli.info_tiler import print_tiler
from vlm_encoders.cli.unknown import unknown_name
from vlm_encoders.cli.values import read_layers, read_size
from vlm_encoders.vlm.published import PUBLISHED

if TYPE_CHECKING:
    from vlm_encoders.report.connector_card import ConnectorOption
    from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["info"]

_SIZES = {"any": "any whose tokens come out whole", "square": "square ones", "native": "this one alone"}


def info(
    name: Annotated[
        str,
        typer.Argument(
            help="Encoder (timm:..., open_clip:..., hf:..., fused:... too), connector, tiler (internvl:max_tiles=6), "
            "or training stage."
        ),
    ],
    image_size: Annotated[str | None, typer.Option(help="Side or HEIGHTxWIDTH of a view in px.")] = None,
    feature_layer: Annotated[str | None, typer.Option(help="Layer from the end, -1 the last; several: -2,-5.")] = None,
    toml: Annotated[bool, typer.Option("--toml", help="Of a stage: its published settings alone, as a file.")] = False,
) -> None:
    """Print what is known of an encoder, a connector, a tiler or a stage; nothing is downloaded or built."""
    from vlm_encoders.registry import chosen_spec

    kind = _kind(name)
    if toml and kind != "stage":
        raise VlmError(f"'{name}' is no training stage, which --toml is of; see list --stages")
    if kind != "encoder":
        if image_size is not None or feature_layer is not None:
            raise VlmError(f"'{name}' is a {kind}; --image-size and --feature-layer are of encoders, leave them out")
        if kind == "stage":
            print_stage(PUBLISHED[name], toml=toml)
        elif kind == "tiler":
            print_tiler(name)
        else:
            print_card(_connector(name))
        return
    size, layers = read_size(image_size), read_layers(feature_layer)
    try:
        spec = chosen_spec(name, image_size=size, feature_layer=layers)
    except UnknownNameError as error:
        if (sentence := unknown_name(name)) is None:
            raise
        raise UnknownNameError(sentence) from error
    card = {
        "name": spec.name,
        "family": spec.family,
        "built by": f"{spec.backend}: {spec.source}",
        **_parts(spec),
        "weights": _weights(spec),
        "licence": spec.licence or "unknown",
        "view": _view(spec),
        "mean, std": "; ".join(dict.fromkeys(f"{each.mean}, {each.std}" for each in spec.pixel_specs)),
        "sizes": _SIZES[spec.sizes] + ("; views of many sizes are encoded together" if spec.packs else ""),
        "positions": spec.positions or "unknown",
        "tokens": _tokens(spec),
        "prefix": _prefix(spec),
        "feature layer": _layer(spec),
        **_inside(spec),
        "parameters": _parameters(spec),
        "source": spec.reference or "unknown",
    }
    print_card(card)


def _kind(name: str) -> str:
    if name in PUBLISHED:
        return "stage"
    return "tiler" if _is_tiler(name) else "connector" if _is_connector(name) else "encoder"


def _is_tiler(name: str) -> bool:
    """Look among tilers, options left aside; they share no name with encoders or connectors."""
    from vlm_encoders.registry import list_encoders
    from vlm_encoders.tiling import PRESETS

    return name not in list_encoders() and name.partition(":")[0].strip() in PRESETS


def _is_connector(name: str) -> bool:
    """Look among connectors, which import torch, only where no encoder has the name."""
    from vlm_encoders.registry import list_encoders

    if name in list_encoders() or not name.isidentifier():
        return False
    from connectors.base import list_connectors

    return name in list_connectors()


def _connector(name: str) -> dict[str, str]:
    from vlm_encoders.report.connector_card import connector_card
    from vlm_encoders.report.connector_examples import LLM_DIM

    card = connector_card(name)
    out = card.out
    grid = "no grid" if out.grid is None else f"a grid of {out.grid[0]} rows by {out.grid[1]} columns"
    return {
        "name": card.name,
        "class": f"{card.cls.__module__}.{card.cls.__qualname__}",
        "does": card.summary[:1].lower() + card.summary[1:],
        "choose it": card.cls.choose or "unknown",
        "used by": card.cls.used_by or "unknown",
        "source": card.cls.source or "unknown",
        "options": "; ".join(_option(option) for option in card.options) or "none",
        "for example": card.example.recipe,
        "tokens": f"{out.num_tokens} of width {out.dim}, {grid}; from a view of {card.example.encoder}",
        "parameters": f"{count(card.parameters)} in all, {count(card.own_parameters)} of them in {name}",
        "FLOPs": f"{count(card.flops)} a view, for an LLM of width {LLM_DIM}",
    }


def _option(option: ConnectorOption) -> str:
    return f"{option.name}={option.default}" if option.default else f"{option.name} ({option.kind})"


def _parameters(spec: EncoderSpec) -> str:
    if not spec.parameters:
        return "unknown before building"
    cut = "" if spec.encodings or spec.kept_layers == spec.num_layers else ", those behind the feature layer included"
    return f"{count(spec.parameters)}{cut}"


def _parts(spec: EncoderSpec) -> dict[str, str]:
    said = [f"{part.name} at {_size(part.image_size)} px, {times}x" for part, times in spec.encodings]
    return {"encoders": "; ".join(said)} if said else {}


def _weights(spec: EncoderSpec) -> str:
    if len(spec.encodings) > 1:
        return "; ".join(_weights(part) for part, _ in spec.encodings)
    if spec.weights is None:
        tag = " (a name with a tag, open_clip:ARCH/TAG, has them)" if spec.name.startswith("open_clip:") else ""
        return f"none known{tag}; --weights takes a folder, a file or random"
    return f"{spec.weights}, revision {spec.revision or 'main'}"


def _view(spec: EncoderSpec) -> str:
    if len(spec.pixel_specs) > 1:
        return "; ".join(_view(each) for each in spec.pixel_specs)
    exact = ", bit-equal to Pillow" if spec.exact_pixels else ""
    return f"{_size(spec.image_size)} px, {spec.resize}, {spec.interpolation}{exact}"


def _tokens(spec: EncoderSpec) -> str:
    tokens = spec.token_spec()
    grid = ", no grid" if tokens.grid is None else f", a grid of {tokens.grid[0]} rows by {tokens.grid[1]} columns"
    return f"{tokens.num_tokens} of width {tokens.dim}{grid}"


def _prefix(spec: EncoderSpec) -> str:
    kinds = [f"{spec.prefix_kinds.count(kind)} {kind}" for kind in dict.fromkeys(spec.prefix_kinds)]
    words = f" ({', '.join(kinds)})" if kinds else ""
    return f"{spec.num_prefix} tokens, kept apart{words}"


def _layer(spec: EncoderSpec) -> str:
    if len(spec.encodings) > 1:
        return "; ".join(_layer(part) for part, _ in spec.encodings)
    kind = "stages" if spec.stages else "blocks"
    layers = " and ".join(map(str, spec.layers))
    norm = f"{'with' if spec.final_norm else 'without'} the {'neck' if spec.neck else 'final norm'}"
    return f"{layers} of {spec.num_layers} {kind} ({spec.kept_layers} are built), {norm}"


def _inside(spec: EncoderSpec) -> dict[str, str]:
    card = {"stages": "; ".join(map(_stage, spec.stages))} if spec.stages else {}
    return {**card, "neck": _stage(spec.neck)} if spec.neck else card


def _stage(stage: Stage) -> str:
    return f"width {stage.dim}, stride {stage.stride}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
