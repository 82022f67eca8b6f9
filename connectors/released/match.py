"""How a file's names are held against a layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from connectors.errors import VlmError
from connectors.released.layout import Layout
from connectors.released.weights import Weights

__all__ = ["WORDS", "encoder_dim", "hindrance", "matches", "names_of", "read"]

# Words of which names of connectors are made.
WORDS = re.compile(
    r"proj|connect|merge|mlp1|qformer|abstract|sampl|perceiver|adapt|align|bridge|compress|fusion|quer(y|ies)|latent"
    r"|newline|ctm\d|^block\d",
    re.IGNORECASE,
)


def read(state: Mapping[str, Tensor], name: str) -> Tensor:
    """Read one tensor of a mapping or of `safetensors.safe_open`.

    Raises:
        VlmError: what stands there is no tensor.
    """
    source: Any = state
    tensor = source.get_tensor(name) if hasattr(source, "get_tensor") else source[name]
    if not isinstance(tensor, Tensor):
        raise VlmError(f"'{name}' is a {type(tensor).__name__}, not a tensor; pass the mapping of names to tensors")
    return tensor


def names_of(keys: Iterable[str], layout: Layout, root: str) -> list[str]:
    """List the names in a file that are the connector's."""
    return [name for name in keys if name.startswith(root) and layout.holds(name[len(root) :])]


def hindrance(layout: Layout, root: str, keys: Iterable[str]) -> str | None:
    """Give a name that no file of the layout has."""
    never = tuple(root + name for name in layout.never)
    return next((name for name in keys if name.startswith(never)), None)


def matches(state: Mapping[str, Tensor], layout: Layout, root: str, keys: Iterable[str]) -> bool:
    """Say whether a file has a layout."""
    own = [name[len(root) :] for name in names_of(keys, layout, root)]
    if not set(layout.marks) <= set(own) or hindrance(layout, root, keys) is not None:
        return False
    if layout.fits is None:
        return True
    shapes = {name: tuple(read(state, root + name).shape) for name in own}
    return layout.fits(Weights(layout.name, shapes, layout.hinted({})))


def encoder_dim(state: Mapping[str, Tensor], layout: Layout, keys: Iterable[str]) -> int | None:
    """Give the width of the encoder that stands in the same file."""
    known = set(keys)
    places = [root + name for root in layout.roots for name in layout.encoder if root + name in known]
    return int(read(state, places[0]).shape[0]) if places else None
