"""What the forward passes of the first steps show: which units ran, under which rules, and what reached them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from connectors.tokens import PackedTokens, VisualTokens

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["Calls", "Watch"]

_REENTRANT = "reentrant gradient checkpointing"


@dataclass
class Calls:
    """What the calls of a unit's modules showed.

    Attributes:
        called: a module that holds trained weights ran.
        tracked: one ran while gradients were tracked.
        connected: what one gave then was part of the graph.
        untracked_by: what turned the tracking off, in words, where nothing ran with it.
        not_finite: dtype of an output that was not finite, or "".
        graph: the output of the whole unit was part of the graph.
        in_place: the unit changed what it was given.
        silent: names of modules that ran, and never while gradients were tracked.
        heard: names of those that ran while they were.
    """

    called: bool = False
    tracked: bool = False
    connected: bool = False
    untracked_by: str = ""
    not_finite: str = ""
    graph: bool = False
    in_place: bool = False
    silent: set[str] = field(default_factory=set)
    heard: set[str] = field(default_factory=set)

    @property
    def reentrant(self) -> bool:
        """Whether the unit ran inside a checkpoint that lets no gradient through."""
        return self.untracked_by == _REENTRANT


class Watch:
    """Hooks on a model that watch its forward passes in training until they are removed.

    Attributes:
        batches: batches that were seen.
        images: a batch held image places.
        answered: a supervised token stood behind an image of its row.
        calls: what the calls of each unit showed.

    Args:
        model: the model.
        trained: by unit, the modules that hold its trained weights themselves, by name.
        outputs: by unit, the module whose output is looked at.
        cut_off: called where a loss that should bring gradients hangs on nothing that trains.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        trained: Mapping[str, Mapping[str, nn.Module]],
        outputs: Mapping[str, nn.Module],
        cut_off: Callable[[], None],
    ) -> None:
        self.batches = 0
        self.images = False
        self.answered = False
        self.calls = {name: Calls() for name in (*outputs, *trained)}
        self._model = model
        self._versions: list[int] = []
        self._cut_off = cut_off
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._batch, with_kwargs=True),
            model.register_forward_hook(self._loss),
        ]
        for name, modules in trained.items():
            self._handles += [
                each.register_forward_hook(partial(self._called, self.calls[name], path))
                for path, each in modules.items()
            ]
        for name, module in outputs.items():
            self._handles.append(module.register_forward_pre_hook(self._input))
            self._handles.append(module.register_forward_hook(partial(self._output, self.calls[name])))

    def remove(self) -> None:
        """Take the hooks away; what they saw stays."""
        while self._handles:
            self._handles.pop().remove()

    def _batch(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, labels = _argument(0, "input_ids", args, kwargs), _argument(2, "labels", args, kwargs)
        if not self._model.training or not isinstance(ids, Tensor):
            return
        self.batches += 1
        places = ids == self._model.image_token_id
        self.images |= bool(places.any())
        if isinstance(labels, Tensor) and not self.answered:
            behind = places.cumsum(1) > 0
            self.answered = bool((behind[:, :-1] & (labels[:, 1:] != -100)).any())

    def _loss(self, model: nn.Module, args: object, output: Any) -> None:
        loss = getattr(output, "loss", None)
        # The backward pass would stop at it, in words of its own.
        if model.training and torch.is_grad_enabled() and isinstance(loss, Tensor) and not loss.requires_grad:
            self._cut_off()

    def _called(self, calls: Calls, path: str, module: nn.Module, args: object, output: object) -> None:
        if not self._model.training:
            return
        calls.called = True
        if torch.is_grad_enabled():
            calls.tracked = True
            calls.heard.add(path)
            calls.silent.discard(path)
            calls.connected |= any(tensor.requires_grad for tensor in _tensors(output))
            return
        if path not in calls.heard:
            calls.silent.add(path)
        if not calls.untracked_by:
            calls.untracked_by = _who_turned_tracking_off()

    def _input(self, module: nn.Module, args: object) -> None:
        self._versions = _versions(args)

    def _output(self, calls: Calls, module: nn.Module, args: object, output: object) -> None:
        calls.in_place |= _versions(args) != self._versions
        calls.graph |= self._model.training and any(tensor.requires_grad for tensor in _tensors(output))
        for tensor in _tensors(output):
            if not calls.not_finite and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                calls.not_finite = str(tensor.dtype).removeprefix("torch.")


def _argument(place: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _versions(args: object) -> list[int]:
    # Counted by torch at each write; inference tensors count nothing.
    return [tensor._version for tensor in _tensors(args) if not tensor.is_inference()]  # noqa: SLF001


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (VisualTokens, PackedTokens)):
        yield output.tokens
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for each in output:
            yield from _tensors(each)


def _who_turned_tracking_off() -> str:
    """Look through the callers for what turned the tracking of gradients off."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    inner = ""
    while frame is not None:
        code = frame.f_code
        if code.co_qualname == "CheckpointFunction.forward":
            return _REENTRANT
        if code.co_filename.endswith("_contextlib.py") and inner:
            return f"the decorator of {inner}"
        # Other decorators may stand between.
        inner = inner if code.co_name == "wrapper" else code.co_qualname
        frame = frame.f_back
    return "a torch.no_grad() around its call"
