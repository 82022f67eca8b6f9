"""Gradient checkpointing: blocks are computed again in the backward pass, in place of keeping what is inside.

The memory of activations falls from all that the blocks compute to what enters each (Chen et al., Training Deep
Nets with Sublinear Memory Cost, arXiv 1604.06174), for about a third more time.

transformers has a switch of its own, `gradient_checkpointing_enable`, whose layers recompute in train mode alone. A
frozen LLM stands in eval mode, so in Stage 1, where gradients pass through all of it to the connector, that switch
does nothing and says nothing. Here the gradient decides, not the mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm_encoders.vlm.decoder import decoder_layers

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["Recompute", "recompute_blocks"]

_COUNTING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class Recompute:
    """The blocks of a model that are recomputed, until `remove` is called or a `with` statement ends.

    Args:
        blocks: modules that are called; those that are recomputed already change hands.

    Attributes:
        blocks: as given.
        count: times that a block was computed again in a backward pass.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.count = 0
        self.blocks = list(blocks)
        self._wrappers = [_Wrapper(block, self) for block in self.blocks]

    def remove(self) -> None:
        """Let the blocks keep their activations again."""
        for wrapper in self._wrappers:
            wrapper.unwrap()
        self._wrappers = []

    def __enter__(self) -> Self:
        """Give the handle itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the wrappers."""
        self.remove()


def recompute_blocks(model: VisionLanguageModel) -> Recompute:
    """Recompute the blocks of encoder and LLM through which gradients pass, in each backward pass.

    Random states are put back for the second time, so dropout is the same, and gradients are equal to the bit on
    the CPU. What is wrapped is the blocks' `forward`, inside the hooks of sharded training, so that weights are
    gathered once for both; no parameter is renamed. An encoder that is frozen is left alone: nothing of it is kept.
    So is the LLM's last layer: the backward pass begins there, when nothing has been let go yet.

    Args:
        model: a model whose stage is applied.

    Raises:
        VlmError: the layers of the LLM are not known.
    """
    encoder: list[nn.Module] = []
    if any(parameter.requires_grad for parameter in model.encoder.parameters()):
        encoder = list(chain.from_iterable(_callable(block) for block in model.encoder.blocks()))
    return Recompute([*encoder, *decoder_layers(model.llm)[:-1]])


class _Wrapper:
    """Stands in place of a block's `forward`; an object, so that a copied block has one of its own."""

    def __init__(self, block: nn.Module, owner: Recompute) -> None:
        earlier = block.__dict__.get("forward")
        if isinstance(earlier, _Wrapper):
            earlier.unwrap()
        self.block = block
        self.owner = owner
        self.active = True
        self.covers = block.__dict__.get("forward")
        # What reads the signature of `forward` is to see that of the block.
        self.__wrapped__ = block.forward
        block.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.active and torch.is_grad_enabled() and self._passes_gradients(args, kwargs)):
            return self.__wrapped__(*args, **kwargs)
        run = _Run(self)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    def unwrap(self) -> None:
        """Put back what the wrapper covers; where another stands on it, let calls through from now on."""
        self.active = False
        if self.block.__dict__.get("forward") is not self:
            return
        if self.covers is None:
            del self.block.__dict__["forward"]
        else:
            self.block.forward = self.covers

    def _passes_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if any(parameter.requires_grad for parameter in self.block.parameters()):
            return True
        return any(tensor.requires_grad for tensor in _tensors((args, kwargs)))


class _Run:
    """One call of a block: the first time in the forward pass, then in the backward pass."""

    def __init__(self, wrapper: _Wrapper) -> None:
        self.wrapper = wrapper
        self.again = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.again:
            self.again = True
            return self.wrapper.__wrapped__(*args, **kwargs)
        self.wrapper.owner.count += 1
        # Batch norms have counted this batch already.
        norms = [module for module in self.wrapper.block.modules() if isinstance(module, _COUNTING) and module.training]
        counted = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
        try:
            return self.wrapper.__wrapped__(*args, **kwargs)
        finally:
            with torch.no_grad():
                for buffer, value in counted:
                    buffer.copy_(value)


def _callable(block: nn.Module) -> Iterator[nn.Module]:
    """Give what of a block has a `forward`: the blocks of staged networks may be lists of modules."""
    if isinstance(block, nn.ModuleList):
        for inner in block:
            yield from _callable(inner)
    elif not isinstance(block, nn.ParameterList):
        yield block


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)
