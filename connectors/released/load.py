"""Released weights into a chain."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from connectors.base import Option
from connectors.chain import Chain
from connectors.errors import VlmError
from connectors.released.find import find_layout
from connectors.released.keys import to_ours
from connectors.released.layout import Layout
from connectors.released.match import encoder_dim, names_of, read
from connectors.released.strict import check_constants, check_hints, compare, require_floats
from connectors.released.write import labels_of, under_their_names

__all__ = ["load_released"]


def load_released(
    state_dict: Mapping[str, Tensor],
    *,
    layout: str | None = None,
    prefix: str | None = None,
    without: str | list[str] | tuple[str, ...] = (),
    **hints: Option,
) -> Chain:
    """Build the connector that a file of released weights holds, and fill it strictly.

    The recipe is read from names and shapes; `recipe_of` writes it. Only tensors of the
    connector are read, so a mapping that reads lazily stays on the disk. Each tensor keeps
    its dtype and is copied.

    Names and shapes are all that is seen. Where two models keep different connectors under
    the same names, as LLaVA and PerceptionLM, which pools as well, the encoder's names in a
    whole file tell them apart, and a part alone is taken for the layout that is named here.
    A library that is not known may share a layout's names and do more, such as a fold
    before the projector: the width that the chain then takes is not the encoder's.
    Tensors beside the connector that look like further parts of it are refused. Shards of
    one model are merged into one mapping first.

    Args:
        state_dict: names to tensors: the whole model, or the connector's part, under the
            names that its library saves; a `safetensors.safe_open` too.
        layout: one of `released_layouts()`; None recognises it.
        prefix: what stands in front of every name, where it is not what the library has;
            "" for the state dict of the connector module's parent.
        without: beginnings of names, prefix and all, that are read as if they were not there.
        **hints: what the weights do not tell, such as `heads=12`; asked for when it is missing.

    Returns:
        The chain, in training mode like any new module. A newline vector that the library
        keeps beside the connector is its `newline`.

    Raises:
        VlmError: the file is of no layout, of several, or holds more of a connector; a name is
            missing or unexpected; a shape is another; a hint is missing, unknown, or contradicts
            the weights; what is passed is no mapping of names.
        UnknownNameError: there is no such layout.
    """
    keys = _keys(state_dict, prefix, tuple(without) if isinstance(without, list | tuple) else (without,))
    found, root = find_layout(state_dict, keys, layout, prefix)
    tensors = {name[len(root) :]: read(state_dict, name) for name in names_of(keys, found, root)}
    require_floats(found, tensors)
    told = found.hinted(hints)
    if found.prepare is not None:
        tensors = found.prepare(tensors, told)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    plan = found.plan_of(shapes, told, encoder_dim(state_dict, found, keys))
    chain = plan.build()
    check_hints(found, chain, hints)
    compare(found, plan, shapes, under_their_names(found, chain))
    check_constants(found, tensors)
    _fill(found, chain, tensors)
    return chain


def _keys(state: Mapping[str, Tensor], prefix: str | None, without: tuple[str, ...]) -> list[str]:
    """List the names of a file, but for those that are to be left out."""
    if isinstance(state, nn.Module) or not hasattr(state, "keys"):
        raise VlmError(
            f"load_released was given a {type(state).__name__}; pass a mapping of names to tensors, such as "
            "safetensors.torch.load_file(path) or the module's state_dict()"
        )
    keys = list(state.keys())
    for what, names in (
        ("a name is", keys),
        ("prefix is", [] if prefix is None else [prefix]),
        ("without has", without),
    ):
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise VlmError(f"{what} {wrong[0]!r}, a {type(wrong[0]).__name__}; names are text, pass it as such")
    for name in without:
        if not name or not any(key.startswith(name) for key in keys):
            raise VlmError(f"without='{name}' leaves nothing out of these {len(keys)} names; pass how a name begins")
    return [key for key in keys if not key.startswith(without)]


def _fill(layout: Layout, chain: Chain, tensors: Mapping[str, Tensor]) -> None:
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (known := to_ours(name, layout.pairs)) is None:
            continue  # a constant
        ours, move = known
        for own, part in zip(ours, move.ours(tensor), strict=True):
            state[own] = part.detach().clone(memory_format=torch.contiguous_format)
    if chain.newline is not None:
        chain.newline = nn.Parameter(state.pop("newline"))
    for label, each in zip(labels_of(chain), chain.connectors, strict=True):
        filled = {name.removeprefix(f"{label}."): part for name, part in state.items() if name.startswith(f"{label}.")}
        each.load_state_dict(filled, assign=True)
