"""The proof that frozen tensors did not move and that trained ones did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from connectors.errors import VlmError
from vlm_encoders.vlm.fingerprint import module_hash
from vlm_encoders.vlm.stages import PARTS, Part

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["FreezeGuard"]


class FreezeGuard:
    """Holds the hashes of a model's tensors, trained and frozen apart in each part.

    What is frozen is remembered by name, so that a parameter which something unfreezes
    during the run is still held to its hash.

    Args:
        model: the model before its first step.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self._trained = {part: _trained_names(model, part) for part in PARTS}
        self.frozen = self._hashes(model, trained=False)
        self._before = self._hashes(model, trained=True)

    def check(self, model: VisionLanguageModel) -> dict[Part, bool]:
        """Say of each part whether it moved.

        Raises:
            VlmError: a frozen tensor moved, or no trained tensor of a part did.
        """
        for part, digest in self._hashes(model, trained=False).items():
            if digest != self.frozen[part]:
                raise VlmError(
                    f"frozen weights of the {part} moved during training; look for code that unfreezes or writes to "
                    "them, and do not use this run's checkpoints"
                )
        after = self._hashes(model, trained=True)
        moved = {part: after[part] != self._before[part] for part in PARTS}
        still = [part for part in PARTS if self._trained[part] and not moved[part]]
        if still:
            raise VlmError(
                f"the {still[0]} was to be trained and did not move; its gradient or its learning rate is zero"
            )
        return moved

    def _hashes(self, model: VisionLanguageModel, *, trained: bool) -> dict[Part, str]:
        hashes: dict[Part, str] = {}
        for part in PARTS:
            tensors = _tensors(model, part)
            hashes[part] = module_hash(
                {name: tensors[name] for name in tensors if (name in self._trained[part]) is trained}
            )
        return hashes


def _tensors(model: VisionLanguageModel, part: Part) -> dict[str, Tensor]:
    # Buffers count too: a frozen batch norm that updates its statistics has moved.
    return dict(model.part_parameters(part)) | dict(model.part_module(part).named_buffers(prefix=part))


def _trained_names(model: VisionLanguageModel, part: Part) -> set[str]:
    names = {name for name, parameter in model.part_parameters(part) if parameter.requires_grad}
    if names:
        # The statistics of a trained part move with it.
        names |= {name for name, _ in model.part_module(part).named_buffers(prefix=part)}
    return names
