"""timm's own filter of checkpoints, which brings weights to timm's names and to the size of a network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from connectors.errors import VlmError
from connectors.tokens import Grid
from vlm_encoders.encoders.timm_network import REFUSALS, create_network
from vlm_encoders.spec import EncoderSpec

__all__ = ["filter_weights", "unfit"]

# The one layout that is released with more places than any view has, and resampled for each size.
_OWN_PLACES = "radio_model.model.patch_generator.pos_embed"


class _Filtered(Exception):  # noqa: N818
    """Carries the weights out of timm's loading, at the moment when its filter is done."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state


class _Resampling(TorchFunctionMode):
    """Notes the shapes of what is resampled."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.interpolate:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def filter_weights(
    spec: EncoderSpec, options: dict[str, Any], size: Grid | None, state: dict[str, Tensor], *, released: bool
) -> dict[str, Tensor]:
    """Let timm's filter rename weights, and resample those of the spec's own size to another.

    Args:
        spec: of the encoder, with the model's name in `source`.
        options: arguments of `timm.create_model`.
        size: (height, width) for which the network is built, px; None for its own.
        state: the weights as they were read.
        released: whether they are timm's own for this model, whose shapes need no proof.

    Raises:
        VlmError: a table or a kernel is of another size than the model's own, or the filter fails.
    """
    if released and size is not None:
        return _filtered(spec, options, size, state)
    with _Resampling() as seen:
        native = _filtered(spec, options, None, state)
    if seen.shapes and not released and _OWN_PLACES not in state:
        raise unfit(spec, _bent(spec, options, state) or _odd(state, seen.shapes[0]))
    return native if size is None else _filtered(spec, options, size, state)


def unfit(spec: EncoderSpec, reason: str) -> VlmError:
    """Make the error of weights that are not of this encoder."""
    return VlmError(f"{spec.name}: weights do not fit: {reason}; give a checkpoint of this encoder")


def _filtered(
    spec: EncoderSpec, options: dict[str, Any], size: Grid | None, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Run the filter for a copy without memory if it can."""
    try:
        found = _filter_on("meta", spec, options, size, state)
        if not any(tensor.is_meta for tensor in found.values()):
            return found
    except (VlmError, *REFUSALS):
        # BEiT's filter, for one, computes with what the model holds; any other reason comes up again.
        pass
    with torch.random.fork_rng():
        try:
            return _filter_on("cpu", spec, options, size, state)
        except (VlmError, *REFUSALS) as error:
            bent = _bent(spec, options, state)
            if isinstance(error, VlmError) and not bent:
                raise
            raise unfit(spec, bent or " ".join(str(error).split())[:300]) from error


def _filter_on(
    device: str, spec: EncoderSpec, options: dict[str, Any], size: Grid | None, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Take the weights at the end of timm's loading: each entry point of timm binds its own filter to itself."""
    thread = threading.get_ident()

    def watch(module: nn.Module, _name: str, _submodule: nn.Module | None) -> None:
        # The hook is the process's: a network that another thread builds is none of ours.
        if threading.get_ident() == thread and not module._load_state_dict_pre_hooks:  # noqa: SLF001
            module.register_load_state_dict_pre_hook(_carry_out)

    overlay = {"state_dict": dict(state), "num_classes": 0, "classifier": None, "source": ""}
    filtering = {**options, "pretrained": True, "pretrained_cfg_overlay": overlay}
    handle = register_module_module_registration_hook(watch)
    try:
        with torch.device(device):
            create_network(spec.name, spec.source, filtering, size)
    except _Filtered as done:
        return done.state
    except KeyError as error:
        raise unfit(spec, f"{error} is missing") from error
    finally:
        handle.remove()
    raise VlmError(f"{spec.name}: timm loads no weights into this model; pass pretrained=False")


def _carry_out(_module: nn.Module, state: dict[str, Tensor], *_rest: object) -> None:
    raise _Filtered(dict(state))


def _bent(spec: EncoderSpec, options: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Say which weight has another shape than under the same name in the model at its own size."""
    with torch.device("meta"):
        native = create_network(spec.name, spec.source, options).state_dict()
    for key, tensor in native.items():
        if key in state and state[key].numel() != tensor.numel():
            return f"{key} is {tuple(state[key].shape)}, {spec.source} has {tuple(tensor.shape)}"
    return ""


def _odd(state: dict[str, Tensor], shape: tuple[int, ...]) -> str:
    """Name the weight of another layout, by the (1, width, rows, columns) that was to be resampled."""
    rows, columns = shape[-2:]
    count = shape[1] * rows * columns
    for key, tensor in state.items():
        kernel = tensor.ndim == 4 and tuple(tensor.shape[-2:]) == (rows, columns)
        # A table may hold a few prefix tokens besides.
        table = tensor.shape[-1:] == shape[1:2] and count <= tensor.numel() <= count + 8 * shape[1]
        if kernel or table:
            return f"{key} is {tuple(tensor.shape)}, of {rows}x{columns}, which is not the model's own size"
    return f"a weight of {rows}x{columns} is not of the model's own size"
