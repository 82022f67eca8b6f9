"""The last decoder layer where a supervised token is predicted, and nowhere else.

All of a decoder layer but its attention works on each token by itself, and of the last layer only the places are
read from which a supervised token is predicted. So it needs keys and values of all tokens, and all else at
these places. The layer's own forward is run, whatever its family: over all tokens as far as its attention, and over the
places alone from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.vlm.decoder import decoder_layers
from vlm_encoders.vlm.place_attention import AttentionCalls, Places, ReachedError, attend_at
from vlm_encoders.vlm.text_packing import is_compiled, model_of, rounding

__all__ = ["NotPrunedError", "last_layer_at"]

_EQUAL: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Layers that were tried, and whether they gave the same at the places."""


class NotPrunedError(VlmError):
    """The last layer does not work as it must to be run at some places alone; run it in full."""


@contextmanager
def last_layer_at(llm: nn.Module, places: Tensor, lengths: Sequence[int] | None) -> Iterator[None]:
    """Within it, an LLM's last layer runs at the places alone, where that gives the same.

    Behind the layer the places stand in one row (1, places, H) where the LLM ends in one norm, else they
    stand where they stood, among zeros.

    Args:
        llm: a Hugging Face causal LM.
        places: (B, T), true where the last layer's output is used.
        lengths: tokens of the samples in a row (1, T); None where each row is a sample.

    Raises:
        NotPrunedError: out of the LLM's forward: run it again without.
    """
    layer = _layer_to_prune(llm, places)
    if layer is None:
        yield
        return
    # What a checkpoint computes again it computes in the backward pass, when the layer is whole again.
    checkpointing = layer.__dict__.get("gradient_checkpointing")
    pruned = _PrunedForward(layer, Places.of(places, lengths), in_a_row=_ends_in_norm(llm, layer))
    layer.__dict__["gradient_checkpointing"] = False
    layer.__dict__["forward"] = pruned
    try:
        yield
    finally:
        del layer.__dict__["forward"], layer.__dict__["gradient_checkpointing"]
        if checkpointing is not None:
            layer.__dict__["gradient_checkpointing"] = checkpointing


def _layer_to_prune(llm: nn.Module, places: Tensor) -> nn.Module | None:
    """Give the last layer, or None where it is not to be touched."""
    model: Any = model_of(llm)
    if 2 * int(places.sum()) > places.numel() or getattr(model.config, "_attn_implementation", None) != "sdpa":
        return None
    try:
        layer = decoder_layers(llm)[-1]
    except VlmError:
        return None
    refused = "forward" in layer.__dict__ or not _EQUAL.get(layer, True)
    refused = refused or _sharded(layer) or is_compiled(llm) or _recomputed_from_outside(model, layer)
    return None if refused else layer


def _sharded(layer: nn.Module) -> bool:
    """Say whether a layer's weights come and go around its forward and that of what it holds."""
    wrapped = type(layer).__module__.startswith("torch.distributed")
    return wrapped or any(hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") for weight in layer.parameters())


def _recomputed_from_outside(model: nn.Module, layer: nn.Module) -> bool:
    """Say whether gradient checkpointing may call a layer anew without the layer's own switch."""
    if hasattr(layer, "gradient_checkpointing"):
        return False
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _ends_in_norm(llm: nn.Module, layer: nn.Module) -> bool:
    return any(
        isinstance(getattr(module, "norm", None), nn.Module)
        for module in model_of(llm).modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and module.layers[-1] is layer  # type: ignore[index]
    )


class _PrunedForward:
    """A layer's forward in two parts: to its attention over all tokens, from there at the places."""

    def __init__(self, layer: nn.Module, places: Places, *, in_a_row: bool) -> None:
        self.layer = layer
        self.whole: Callable[..., Any] = layer.forward
        self.places = places
        self.in_a_row = in_a_row
        self.called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.called:
            raise self._refusal("is called twice")
        self.called = True
        if self.layer not in _EQUAL:
            _EQUAL[self.layer] = self._equal(args, kwargs)
        if not _EQUAL[self.layer]:
            return self.whole(*args, **kwargs)
        made = self._at_places(args, kwargs)
        if isinstance(made, Tensor):
            return self._placed(made)
        return (self._placed(made[0]), *made[1:])

    def _at_places(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Give what the layer gives, its hidden states at the places alone: (1, places, H)."""
        with ExitStack() as held, AttentionCalls():
            self._query_at_places(held)
            try:
                self.whole(*args, **kwargs)
            except ReachedError as reached:
                call = reached.call
            else:
                raise self._refusal("does not attend by torch's own function")
        if call.key.shape[2] != self.places.shape[1] or call.query.shape[0] != self.places.shape[0]:
            raise self._refusal(f"attends by a query of shape {tuple(call.query.shape)}")
        with AttentionCalls(attend_at(call, self.places)) as attention:
            made = self.whole(*self.places.take_all(args), **self.places.take_all(kwargs))
        if attention.calls != 1:
            raise self._refusal(f"attends {attention.calls} times")
        return made

    def _query_at_places(self, held: ExitStack) -> None:
        """Let a query projection of its own see the places alone, until `held` ends."""
        for name, module in self.layer.named_modules():
            if name.rpartition(".")[2] == "q_proj":
                held.callback(module.register_forward_pre_hook(self._narrow).remove)
                held.callback(module.register_forward_hook(self._widen).remove)

    def _narrow(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.places.take(args[0]), *args[1:])

    def _widen(self, _: nn.Module, args: tuple[Tensor, ...], made: Tensor) -> Tensor:
        return self.places.put(made)

    def _placed(self, made: Tensor) -> Tensor:
        return made if self.in_a_row else self.places.put(made)

    def _equal(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Try once, on the batch itself, whether the layer gives the same at the places."""
        if any(isinstance(module, nn.Conv1d) for module in self.layer.modules()):
            return False
        modes = [(module, module.training) for module in self.layer.modules()]
        for module, _ in modes:
            module.training = False
        try:
            with torch.no_grad():
                made, wanted = self._at_places(args, kwargs), self.whole(*args, **kwargs)
            made, wanted = (each if isinstance(each, Tensor) else each[0] for each in (made, wanted))
            wanted = self.places.take(wanted)
        except torch.OutOfMemoryError:
            # A RuntimeError that says nothing of the layer.
            raise
        except (IndexError, RuntimeError, TypeError, ValueError, VlmError):
            return False
        finally:
            for module, mode in modes:
                module.training = mode
            # Autocast keeps the weights that it casts: none cast without gradients is to reach what follows.
            torch.clear_autocast_cache()
        if made.shape != wanted.shape:
            return False
        # Sums of another order round otherwise, by about a unit of what they are added to.
        allowed = max(1e-4, 4 * rounding(made)) * float(wanted.abs().max())
        return float((made - wanted).abs().max()) <= allowed

    def _refusal(self, why: str) -> NotPrunedError:
        _EQUAL[self.layer] = False
        return NotPrunedError(f"the last layer, {type(self.layer).__name__}, {why}; run it in full")
