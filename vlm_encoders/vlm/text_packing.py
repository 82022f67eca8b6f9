"""Samples one after another in a row of the LLM, none of which sees another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from connectors.errors import VlmError
from vlm_encoders.vlm.stages import has_adapter

__all__ = ["SampleMask", "is_compiled", "logits_alone", "model_of", "packed_inputs", "rounding", "takes", "try_packing"]

_KEPT_APART: WeakKeyDictionary[nn.Module, set[bool]] = WeakKeyDictionary()
"""LLMs that were seen to keep samples apart: by a mask, by positions alone, or by either."""


class SampleMask(Tensor):
    """Says to attention which tokens of a row are of one sample, without a (T, T) mask.

    A model of transformers hands a mask (1, 1, T, T) as it is to each layer, in the backward pass of
    gradient checkpointing too. Where this one comes to torch's `scaled_dot_product_attention`, the
    samples are attended to one by one, causally and without a mask; in any other function it is the
    mask of booleans that it stands for.
    """

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Self:
        """Make the mask of samples of so many tokens."""
        total = sum(lengths)
        mask = torch.ones(1, dtype=torch.bool, device=device).expand(1, 1, total, total).as_subclass(cls)
        mask.lengths = tuple(lengths)
        return mask

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attend within samples; give shape, dtype and device without making the mask."""
        options = dict(kwargs or {})
        if func is scaled_dot_product_attention:
            return _attend(*args, **options)
        if getattr(func, "__name__", "") in {"__get__", "size", "dim", "__len__"}:
            return super().__torch_function__(func, types, args, options)  # type: ignore[no-untyped-call]
        return func(*(_dense(value) for value in args), **{name: _dense(value) for name, value in options.items()})


def packed_inputs(llm: nn.Module, embeds: Tensor, lengths: Sequence[int]) -> dict[str, Tensor]:
    """Give the inputs by which an LLM keeps the samples of a row apart.

    Args:
        llm: a Hugging Face causal LM.
        embeds: (1, T, H), the samples one after another.
        lengths: tokens of each.

    Returns:
        Positions that begin anew at each sample, and a mask where the LLM attends by torch's own
        function; else it is left to transformers, which reads the samples from the positions.

    Raises:
        VlmError: the lengths do not add up, or the LLM does not keep samples apart.
    """
    if embeds.shape[0] != 1 or sum(lengths) != embeds.shape[1] or min(lengths, default=0) < 1:
        raise VlmError(
            f"packed samples are one row of as many tokens as their lengths say, got embeddings {tuple(embeds.shape)} "
            f"and lengths that sum to {sum(lengths)}; collate them with packed=True"
        )
    if len(lengths) == 1:
        return {}
    masked = _takes_mask(llm, max(lengths))
    if masked not in _KEPT_APART.setdefault(llm, set()):
        _require_apart(llm, embeds, masked=masked)
        _KEPT_APART[llm].add(masked)
    return _inputs(lengths, embeds.device, masked=masked)


def try_packing(llm: nn.Module) -> None:
    """Try, before a run, whether an LLM keeps samples apart, in each way in which it may be asked.

    Else it is tried when the first row of several samples comes, which processes that share its weights must not
    do one by one.

    Raises:
        VlmError: it does not keep them apart.
    """
    embedding: Any = llm.get_input_embeddings()  # type: ignore[operator]
    rows = embedding.weight.detach()[None, :12]
    config: Any = model_of(llm).config
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max((limit for limit in limits if limit is not None), default=0) + 1
    for masked in {_takes_mask(llm, 1), _takes_mask(llm, longest)}:
        _require_apart(llm, rows, masked=masked)
        _KEPT_APART.setdefault(llm, set()).add(masked)


def takes(llm: nn.Module, name: str) -> bool:
    """Say whether an LLM's forward names a keyword."""
    return name in inspect.signature(model_of(llm).forward).parameters


def model_of(llm: nn.Module) -> nn.Module:
    """Give the LLM itself, out of the wrappers of peft and `torch.compile`, which take any keyword."""
    whole: Any = getattr(llm, "_orig_mod", llm)
    inner: nn.Module = whole.get_base_model() if has_adapter(whole) else whole
    return inner


def is_compiled(llm: nn.Module) -> bool:
    """Say whether an LLM or a module of it is compiled, so that what Python puts around it is traced."""
    return any(
        type(module).__module__.startswith("torch._dynamo") or getattr(module, "_compiled_call_impl", None) is not None
        for module in llm.modules()
    )


def logits_alone(llm: nn.Module) -> dict[str, bool]:
    """Give the switches by which an LLM gives logits and nothing beside."""
    # The balancing loss of experts is no part of ours, and takes masks of two dimensions alone.
    routers = {"output_router_logits": False} if takes(llm, "output_router_logits") else {}
    return {"use_cache": False, **routers}


def rounding(values: Tensor) -> float:
    """Give the unit of what is computed from values, which autocast computes in a dtype of its own."""
    device = values.device.type
    dtypes = {values.dtype, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _takes_mask(llm: nn.Module, longest: int) -> bool:
    """Say whether one mask is right for all layers, where the longest sample has so many tokens."""
    config: Any = model_of(llm).config
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    # Where a window cuts into a sample, layers differ in their masks: transformers makes those from the positions.
    within = all(longest <= limit for limit in limits if limit is not None)
    # The guards of compiled code hold a mask's strides, which this one does not have.
    return within and getattr(config, "_attn_implementation", None) == "sdpa" and not is_compiled(llm)


def _inputs(lengths: Sequence[int], device: torch.device, *, masked: bool) -> dict[str, Tensor]:
    inputs = {"position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None]}
    return inputs | ({"attention_mask": SampleMask.of(lengths, device)} if masked else {})


def _require_apart(llm: nn.Module, embeds: Tensor, *, masked: bool) -> None:
    """Refuse an LLM that reads a sample otherwise behind another than alone, which is tried on a few tokens."""
    name = type(model_of(llm)).__name__
    refusal = "so its samples cannot share a row; leave packing out: pack_tokens = None"
    if not takes(llm, "position_ids") or getattr(model_of(llm).config, "alibi", False):
        raise VlmError(f"{name} counts positions by itself, {refusal}")
    noise = torch.Generator().manual_seed(0)
    row = torch.randn(1, 12, embeds.shape[-1], generator=noise) * float(embeds.detach().float().std())
    row = row.to(embeds.device, embeds.dtype)
    other = torch.cat([-row[:, :7], row[:, 7:]], dim=1)
    modes = [(module, module.training) for module in llm.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            plain = logits_alone(llm)
            inputs = plain | _inputs((7, 5), embeds.device, masked=masked)
            first, second = (llm(inputs_embeds=each, **inputs).logits[0, 7:].float() for each in (row, other))
            alone = llm(inputs_embeds=row[:, 7:], **plain).logits[0].float()
    finally:
        for module, mode in modes:
            module.training = mode
        # Autocast keeps the weights that it casts: none cast without gradients is to reach what follows.
        torch.clear_autocast_cache()
    # Experts see other groups of tokens, which rounds otherwise; all else is equal to the bit. Alone, all rounds so.
    largest = float(first.abs().max())
    changed = float((first - second).abs().max()) > torch.finfo(embeds.dtype).eps ** 0.5 * largest
    moved = float((first - alone).abs().max()) > rounding(embeds) ** 0.5 * largest
    recurrent = any(isinstance(module, nn.Conv1d) for module in llm.modules())
    if recurrent or changed or moved:
        raise VlmError(
            f"{name} ({_attention(llm)}) carries what it has read from sample to sample, or counts places in the row, "
            f"{refusal}"
        )


def _attention(llm: nn.Module) -> str:
    return f"attn_implementation='{getattr(model_of(llm).config, '_attn_implementation', None)}'"


def _dense(value: Any) -> Any:
    if not isinstance(value, SampleMask):
        return value
    number = torch.repeat_interleave(torch.tensor(value.lengths)).to(value.device)
    return (number[:, None] == number).tril()[None, None]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: SampleMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002
    **options: Any,
) -> Tensor:
    """Attend within each sample: (1, heads, T, d) of all samples in, the same shape out."""
    lengths = attn_mask.lengths
    shapes = [tuple(part.shape) for part in (query, key, value)]
    if is_causal or any((shape[0], shape[2]) != (1, sum(lengths)) for shape in shapes):
        raise VlmError(
            f"packed samples of {sum(lengths)} tokens attend within one row, got a query, key and value of shapes "
            f"{shapes}; leave packing out: pack_tokens = None"
        )
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    # Split, not cut: in the backward pass the pieces are joined once.
    pieces = zip(*(part[0].split(sizes, dim=1) for part in (query, key, value)), strict=True)
    found = []
    for (length, count), piece in zip(runs, pieces, strict=True):
        # (heads, count * length, d) to (count, heads, length, d).
        each = [part.unflatten(1, (count, length)).transpose(0, 1) for part in piece]
        made = scaled_dot_product_attention(each[0], each[1], each[2], None, dropout_p, is_causal=True, **options)
        found.append(made.transpose(1, 2).flatten(0, 1))
    return torch.cat(found)[None].transpose(1, 2)
