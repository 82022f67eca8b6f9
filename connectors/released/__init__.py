"""Weights of released models, recognised, loaded strictly, and written back."""

from connectors.released.find import released_layouts
from connectors.released.load import load_released
from connectors.released.write import to_released

__all__ = ["load_released", "released_layouts", "to_released"]
