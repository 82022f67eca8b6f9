"""The answer to a name that nothing has."""

from __future__ import annotations

import re

__all__ = ["unknown_name"]


def unknown_name(name: str) -> str | None:
    """Say what a name could mean among all that have one; None where it has the form of an encoder's."""
    from connectors.base import list_connectors
    from connectors.registry import nearest
    from vlm_encoders.registry import list_encoders
    from vlm_encoders.tiling import PRESETS
    from vlm_encoders.vlm.published import PUBLISHED

    connectors, encoders = list_connectors(), list_encoders()
    first = re.split(r"[:+(]", name)[0]
    if first != name and (first in connectors or ":" not in name):
        card = f"info {first} shows its first link, " if first in connectors else ""
        return f"'{name}' is a connector's recipe; {card}budget --connector '{name}' costs it"
    tilers = list(PRESETS)
    if ":" in name or "[" in name:
        close = nearest(first.lower(), tilers)
        return f"no tiler '{first}'; {close}" if "=" in name and close.startswith("did you mean") else None
    close = nearest(name.lower(), [*connectors, *encoders, *tilers, *PUBLISHED])
    if not close.startswith("did you mean"):
        kinds = {"connectors": connectors, "encoders": encoders, "tilers": tilers, "stages": list(PUBLISHED)}
        close = "; ".join(f"of {kind} {nearest(name, names)}" for kind, names in kinds.items())
    return f"no encoder, connector, tiler or stage '{name}'; {close}"
