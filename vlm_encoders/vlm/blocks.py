"""What of a unit its policy trains: blocks counted from the end, norms, and how deep each parameter lies."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor

from torch import nn

from connectors.errors import VlmError
from vlm_encoders.encoder import Encoder
from vlm_encoders.vlm.units import Unit

__all__ = [
    "chosen_modules",
    "chosen_parameters",
    "is_adapter",
    "layer_scales",
    "plain_name",
    "trained_blocks",
    "unit_blocks",
]


def is_adapter(name: str) -> bool:
    """Say whether a parameter of this name is a low-rank adapter's."""
    return "lora_" in name


def plain_name(name: str) -> str:
    """Give a parameter's name in the model as it is without adapters around it."""
    return name.replace(".base_model.model.", ".").replace(".base_layer.", ".")


def unit_blocks(unit: Unit) -> list[nn.Module]:
    """Give the blocks of an encoder that are kept, or the decoder layers of an LLM, first to last.

    Raises:
        VlmError: the unit has no blocks, or its LLM has other layers than its config names.
    """
    if isinstance(unit.module, Encoder):
        return list(unit.module.blocks())
    if unit.part == "llm":
        # That module asks this package's stages about adapters.
        from vlm_encoders.vlm.decoder import decoder_layers

        return decoder_layers(unit.module)
    raise VlmError(f"the {unit.name} has no blocks to count; leave last_blocks and layer_decay out")


def trained_blocks(unit: Unit) -> list[nn.Module] | None:
    """Give the blocks that `last_blocks` trains; None where the policy does not count blocks.

    Raises:
        VlmError: the unit has fewer blocks, or the fraction leaves none.
    """
    last = unit.policy.last_blocks
    if last is None:
        return None
    blocks = unit_blocks(unit)
    if isinstance(last, int):
        if last > len(blocks):
            raise VlmError(f"it trains the last {last} blocks, the {unit.name} has {len(blocks)}")
        return blocks[-last:]
    # A released half-open tower counts the whole network's layers, also those that are never run.
    behind = unit.module.spec.num_layers - unit.module.spec.kept_layers if isinstance(unit.module, Encoder) else 0
    depth = len(blocks) + behind
    count = floor(last * depth + 1e-9) - behind
    if count < 1:
        raise VlmError(
            f"it trains the last {last:g} of {depth} blocks of the {unit.name}, of which {behind} behind the feature "
            "layer are not kept, so none is left; give a larger fraction"
        )
    return blocks[-count:]


def chosen_modules(unit: Unit) -> list[nn.Module] | None:
    """Give the modules that train where a policy trains less than the whole unit; None for the whole.

    Raises:
        VlmError: the policy names blocks or norms that the unit does not have.
    """
    blocks = trained_blocks(unit)
    if not unit.policy.norms_only:
        return blocks
    inside = [unit.module] if blocks is None else blocks
    norms = [each for module in inside for each in module.modules() if _is_norm(each)]
    if not norms:
        raise VlmError(f"it trains the norms of the {unit.name} alone, which has none; leave norms_only out")
    return norms


def chosen_parameters(unit: Unit, named: Iterable[tuple[str, nn.Parameter]]) -> set[int]:
    """Give the ids of the parameters that the unit's policy trains, out of its named ones."""
    policy = unit.policy
    if not policy.trains:
        return set()
    if policy.adapts:
        return {id(parameter) for name, parameter in named if is_adapter(name)}
    modules = chosen_modules(unit)
    inside = None
    if modules is not None:
        inside = {id(each) for module in modules for each in module.parameters(recurse=not policy.norms_only)}
    return {
        id(parameter)
        for name, parameter in named
        if not is_adapter(name) and (inside is None or id(parameter) in inside)
    }


def layer_scales(unit: Unit) -> dict[int, float]:
    """Give the factor on the learning rate of each parameter, by id; empty without `layer_decay`.

    Of L blocks, what stands behind the last has factor 1, block i (from 0) `layer_decay ** (L - i)`,
    and what stands before the first, the embedding, `layer_decay ** (L + 1)`.

    Source: BEiT, arXiv 2106.08254, `LayerDecayValueAssigner` of its code; its head is the connector here.
    """
    decay = unit.policy.layer_decay
    if decay is None:
        return {}
    blocks = unit_blocks(unit)
    depths = {id(each): place + 1 for place, block in enumerate(blocks) for each in block.parameters()}
    scales: dict[int, float] = {}
    reached = 0
    for _, parameter in unit.module.named_parameters():
        # Networks register their layers in order, so what is in no block lies where it is named.
        depth = depths.get(id(parameter))
        reached = reached if depth is None else max(reached, depth)
        behind = depth is None and reached == len(blocks)
        scales[id(parameter)] = 1.0 if behind else decay ** (len(blocks) + 1 - (depth or reached))
    return scales


def _is_norm(module: nn.Module) -> bool:
    named = "norm" in type(module).__name__.lower()
    own = list(module.parameters(recurse=False))
    return named and bool(own) and all(parameter.ndim == 1 for parameter in own)
