"""Weights for a model of timm that was cut: found, brought to its names and size, and loaded strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.encoders.timm_filter import filter_weights, unfit
from vlm_encoders.encoders.timm_network import create_network
from vlm_encoders.encoders.timm_plan import Plan
from vlm_encoders.encoders.weights import find_weights, load_state, read_json
from vlm_encoders.spec import EncoderSpec

__all__ = ["check_architecture", "fit_weights", "load_weights", "read_weights"]


def read_weights(spec: EncoderSpec, plan: Plan, *, pretrained: bool | str) -> dict[str, Tensor]:
    """Read released weights, or those of a folder or file, under timm's names and at the size of the plan.

    Raises:
        VlmError: there are no weights, or some are of no such model, with or without a head.
    """
    if pretrained is True and spec.weights is None:
        _refuse_url(spec)
    path = find_weights(spec.name, spec.weights, pretrained=pretrained, revision=spec.revision)
    if isinstance(pretrained, str):
        check_architecture(spec, path, spec.source)
    return _named(spec, plan, load_state(path, spec.name), released=_released(spec, pretrained))


def fit_weights(
    network: nn.Module, spec: EncoderSpec, plan: Plan, state: dict[str, Tensor], *, pretrained: bool | str
) -> None:
    """Bring weights to timm's names and to the size of the plan, and load them as `load_weights` does.

    Raises:
        VlmError: the weights are not of this model.
    """
    load_weights(network, spec, _named(spec, plan, state, released=_released(spec, pretrained)))


def load_weights(network: nn.Module, spec: EncoderSpec, state: dict[str, Tensor]) -> None:
    """Load strictly: all that was kept must come; heads and what was cut off are left over.

    Raises:
        VlmError: a parameter is missing or has another shape.
    """
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in state]
    if missing:
        raise unfit(spec, _count(missing, "missing"))
    try:
        network.load_state_dict({key: state[key] for key in wanted})
    except RuntimeError as error:
        raise unfit(spec, " ".join(str(error).split())[:400]) from error


def check_architecture(spec: EncoderSpec, path: Path, model: str) -> None:
    """Hold the config that timm's `save_for_hf` wrote into a folder, if there is one, to timm's name of the model.

    Raises:
        VlmError: it names another architecture, whose weights may have the same shapes all the same.
    """
    config = path / "config.json"
    if not config.is_file():
        return
    told = read_json(config, spec.name, writer="timm's save_for_hf").get("architecture")
    ours = model.partition(".")[0]
    if isinstance(told, str) and told.partition(".")[0] != ours:
        raise VlmError(f"{spec.name}: '{path}' holds weights of {told}, not of {ours}; use 'timm:{path}' for them")


def _released(spec: EncoderSpec, pretrained: bool | str) -> bool:  # noqa: FBT001
    """Say whether weights come from the hub: those of a folder or file may be of anything."""
    return pretrained is True and spec.weights is not None and not Path(spec.weights).expanduser().exists()


def _refuse_url(spec: EncoderSpec) -> None:
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(spec.source)
    if known is not None and known.url:
        raise VlmError(
            f"{spec.name}: its released weights are on no hub; download {known.url} and pass pretrained=FILE"
        )


def _named(spec: EncoderSpec, plan: Plan, state: dict[str, Tensor], *, released: bool) -> dict[str, Tensor]:
    # timm takes an empty state for none, and would fetch its own.
    if not state:
        raise unfit(spec, "none of them is of this network")
    options = {**dict(spec.options), "attn_implementation": None}
    state = filter_weights(spec, options, plan.size, state, released=released)
    known, heads = _known(spec, options, plan)
    unknown = [key for key in state if key not in known and not key.startswith(heads)]
    if unknown:
        raise unfit(spec, _count(unknown, "unexpected"))
    return state


def _known(spec: EncoderSpec, options: dict[str, Any], plan: Plan) -> tuple[set[str], tuple[str, ...]]:
    """Give the keys of the whole model with its own head, and how keys of heads begin."""
    with torch.device("meta"):
        whole = create_network(spec.name, spec.source, {**options, "num_classes": 1}, plan.size)
        headless = create_network(spec.name, spec.source, options, plan.size)
    heads = whole.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    return {*whole.state_dict(), *headless.state_dict()}, prefixes


def _count(keys: list[str], kind: str) -> str:
    shown = ", ".join(keys[:5])
    return f"{len(keys)} {kind} ({shown}{', ...' if len(keys) > 5 else ''})"
