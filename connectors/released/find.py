"""Which layout a file of weights has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from connectors.errors import UnknownNameError, VlmError
from connectors.registry import nearest
from connectors.released.convolutional import CONVOLUTIONAL
from connectors.released.folded import FOLDED
from connectors.released.layout import Layout
from connectors.released.match import WORDS, hindrance, matches, names_of
from connectors.released.mergers import MERGERS
from connectors.released.mlps import MLPS
from connectors.released.qformers import QFORMERS
from connectors.released.resamplers import RESAMPLERS
from connectors.released.unknown import unknown

__all__ = ["LAYOUTS", "find_layout", "layout_of", "released_layouts"]

LAYOUTS: dict[str, Layout] = {
    each.name: each for each in (*MLPS, *FOLDED, *MERGERS, *QFORMERS, *RESAMPLERS, *CONVOLUTIONAL)
}
"""Every layout by its name."""

_SHOWN = 3


def released_layouts() -> dict[str, Layout]:
    """Give the layouts by name: what `load_released` recognises, with source and hints."""
    return dict(LAYOUTS)


def layout_of(name: str) -> Layout:
    """Find a layout by its exact name.

    Raises:
        UnknownNameError: there is none.
    """
    if not isinstance(name, str) or name not in LAYOUTS:
        raise UnknownNameError(f"no layout '{name}'; {nearest(str(name), list(LAYOUTS))}")
    return LAYOUTS[name]


def find_layout(
    state: Mapping[str, Tensor], keys: list[str], name: str | None, prefix: str | None
) -> tuple[Layout, str]:
    """Find the layout of a file, and what stands in front of its names.

    Asked for by name, one tensor of the connector is enough.

    Raises:
        VlmError: no layout fits, or several do, or the file has more of a connector than the layout.
        UnknownNameError: there is no such layout.
    """
    layouts = list(LAYOUTS.values()) if name is None else [layout_of(name)]
    places = [(each, root) for each in layouts for root in (each.roots if prefix is None else (prefix,))]
    if name is None:
        found = [(each, root) for each, root in places if matches(state, each, root, keys)]
    else:
        found = [(each, root) for each, root in places if names_of(keys, each, root)]
    if not found:
        raise unknown(state, keys, layouts, name, prefix)
    if len(found) > 1:
        fit = " and ".join(f"layout='{layout.name}', prefix='{root}'" for layout, root in found)
        raise VlmError(f"these weights fit several layouts; pass the one that is meant of {fit}")
    layout, root = found[0]
    if (other := hindrance(layout, root, keys)) is not None:
        raise VlmError(
            f"no file of layout '{layout.name}' has '{other}', which is of a model with another connector; "
            f"pass without='{other}' if that is all the same one"
        )
    _refuse_more(state, keys, layout, root)
    return layout, root


def _refuse_more(state: Mapping[str, Tensor], keys: Sequence[str], layout: Layout, root: str) -> None:
    """Refuse a file that has parts of a connector beside those of the layout: they would be lost."""
    parents = {"", *(f"{part.rstrip('.').rpartition('.')[0]}." for part in layout.parts if "." in part.rstrip("."))}
    levels = {top + parent for top in ("", root, *layout.roots) for parent in parents}
    held = set(names_of(keys, layout, root))
    more: dict[str, list[str]] = {}
    for key in keys:
        for level in levels:
            part, dot, _ = key.removeprefix(level).partition(".")
            if key not in held and key.startswith(level) and WORDS.search(part):
                more.setdefault(level + part + dot, []).append(key)
    if not more:
        return
    # Who told between connectors that are known by their names means only one of them.
    for other in LAYOUTS.values():
        for place in other.roots:
            if matches(state, other, place, keys):
                held |= set(names_of(keys, other, place))
    lost = [part for part, names in sorted(more.items()) if not held.issuperset(names)]
    if lost:
        tail = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise VlmError(
            f"beside the connector of layout '{layout.name}' stand {', '.join(lost[:_SHOWN])}{tail}, which look like "
            f"further parts of it and would be lost; pass without={tuple(lost)} if the model does not need them"
        )
