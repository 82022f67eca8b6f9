"""The contract of a connector, for the built-in ones and for plugins alike.

A plugin's own test is one line: `check_connector(Mine(1024), TokenSpec(576, 1024, (24, 24)))`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from connectors.base import Connector
from connectors.chain import Chain, Wrapper
from connectors.errors import TokenShapeError, VlmError
from connectors.tokens import PackedTokens, TokenSpec, VisualTokens

__all__ = ["check_connector"]

_BATCH = 3


def check_connector(connector: Connector, spec: TokenSpec) -> None:
    """Hold a connector to the contract that chains, budgets and checkpoints rely on.

    The connector itself is left as it is: copies are run, in fp32, bf16 and fp16, on the CPU.

    Args:
        connector: a connector or a chain, built for tokens of `spec`.
        spec: tokens that it takes; a small grid keeps the check fast.

    Raises:
        VlmError: a clause is broken; the sentence names it.
    """
    given: object = connector
    if not isinstance(given, Connector):
        what = given.__name__ if isinstance(given, type) else type(given).__name__
        raise VlmError(f"check_connector takes a connector that is built, got {what}; build it for the spec first")
    model = copy.deepcopy(connector).to("cpu", torch.float32).eval()
    for module in model.modules():
        if isinstance(module, Connector):
            module.newline = None  # a layout of tiles draws and places it
    half = copy.deepcopy(model).to(torch.bfloat16)
    for each in _accepted(model, spec):
        _check_shape(model, each, torch.float32)
        _check_shape(half, each, torch.bfloat16)
    _check_large(model, spec)
    _check_rows(model, spec)
    _check_start(copy.deepcopy(model))
    _check_gradients(copy.deepcopy(model).train(), spec)
    _check_rebuild(model, spec)
    _check_packed(model, spec)


def _accepted(model: Connector, spec: TokenSpec) -> Iterator[TokenSpec]:
    """Give the spec, and the changes of it that the connector says it takes."""
    yield spec
    changes = (
        replace(spec, dim=spec.dim + 1),
        replace(spec, grid=None),
        replace(spec, num_prefix=0),
        replace(spec, num_prefix=spec.num_prefix + 1),
        TokenSpec(spec.num_tokens + 1, spec.dim, (1, spec.num_tokens + 1)),
    )
    yield from (change for change in changes if _takes(model, change))


def _check_shape(model: Connector, spec: TokenSpec, dtype: torch.dtype) -> None:
    stated = model.out_spec(spec)
    for batch in (1, _BATCH):
        visual = _random_tokens(spec, batch, dtype)
        before = copy.deepcopy((visual.tokens, visual.prefix))
        with torch.no_grad():
            out = _run(model, visual)
        if out.spec != stated:
            raise _broken(model, "out_spec states what forward gives", f"stated {stated}, gave {out.spec}")
        if out.tokens.shape[0] != batch:
            raise _broken(model, "views stay apart", f"{batch} views came, {out.tokens.shape[0]} went")
        if out.tokens.dtype != dtype:
            raise _broken(model, "the dtype is kept", f"{dtype} came, {out.tokens.dtype} went")
        if not out.tokens.isfinite().all():
            raise _broken(model, "numbers are finite", f"{dtype} tokens around 1 gave NaN or infinity")
        if not all(_same(new, old) for new, old in zip((visual.tokens, visual.prefix), before, strict=True)):
            raise _broken(model, "the input is left unchanged", "forward wrote into its tokens; add out of place")


def _check_large(model: Connector, spec: TokenSpec) -> None:
    visual = _random_tokens(spec, 1, torch.float16)
    prefix = None if visual.prefix is None else visual.prefix * 1000
    # Encoders give values of up to a thousand in a few channels, and fp16 ends at 65504.
    with torch.no_grad():
        out = _run(copy.deepcopy(model).half(), VisualTokens(visual.tokens * 1000, visual.grid, prefix))
    if not out.tokens.isfinite().all():
        raise _broken(model, "numbers are finite", "fp16 tokens around 1000 gave NaN or infinity")


def _check_start(model: Connector) -> None:
    """Hold `reset_parameters` to its seed, to every parameter, and to leaving the global generator alone."""
    clause = "initial weights come from a seed of their own"
    before = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        model.reset_parameters(seed)
        drawn.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    for name, first in drawn[0].items():
        if not first.isfinite().all():
            raise _broken(model, clause, f"'{name}' is not drawn; write init_weights")
        if not torch.equal(first, drawn[1][name]):
            raise _broken(model, clause, f"'{name}' differs between two draws of one seed; draw by `draw` alone")
    if not torch.equal(before, torch.get_rng_state()):
        raise _broken(model, clause, "the global generator was used; draw by `draw` alone")
    random = [name for name, first in drawn[0].items() if _varies(first)]
    if random and all(torch.equal(drawn[0][name], drawn[2][name]) for name in random):
        raise _broken(model, clause, "another seed gives the same weights")


def _varies(tensor: Tensor) -> bool:
    return bool((tensor != tensor.flatten()[0]).any())


def _check_rows(model: Connector, spec: TokenSpec) -> None:
    visual = _random_tokens(spec, _BATCH, torch.float32)
    with torch.no_grad():
        whole = _run(model, visual).tokens
        if not torch.equal(whole, _run(model, visual).tokens):
            raise _broken(model, "eval is deterministic", "two runs on the same tokens differ")
        for row in range(_BATCH):
            part = slice(row, row + 1)
            prefix = None if visual.prefix is None else visual.prefix[part]
            alone = _run(model, VisualTokens(visual.tokens[part], visual.grid, prefix)).tokens
            _require_close(model, "each view counts alone", alone, whole[part])


def _check_gradients(model: Connector, spec: TokenSpec) -> None:
    visual = _random_tokens(spec, _BATCH, torch.float32)
    visual.tokens.requires_grad_()
    out = _run(model, visual).tokens
    # A plain sum would hide what a norm or softmax cancels.
    loss = (out * torch.randn(out.shape, generator=_generator()))[0].sum()
    if not loss.requires_grad:
        raise _broken(model, "gradients reach the tokens", "forward runs under no_grad or detaches")
    loss.backward()
    if visual.tokens.grad is None:
        raise _broken(model, "gradients reach the tokens", "they got none, so the encoder could not be trained")
    if visual.tokens.grad[1:].any():
        raise _broken(model, "each view counts alone", "in training, the first view's output depends on the others")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            raise _broken(model, "gradients reach every parameter", f"'{name}' got none, or one that is not finite")


def _check_rebuild(model: Connector, spec: TokenSpec) -> None:
    try:
        again = _rebuild(model, spec).to(torch.float32).eval()
        again.load_state_dict(model.state_dict(), strict=True)
    except (TypeError, RuntimeError, VlmError) as error:
        raise _broken(model, "build(**options()) and load_state_dict give the connector again", str(error)) from error
    visual = _random_tokens(spec, 1, torch.float32)
    with torch.no_grad():
        if not torch.equal(_run(again, visual).tokens, _run(model, visual).tokens):
            detail = "the rebuilt one gives other numbers; keep all state in parameters, buffers and options"
            raise _broken(model, "build(**options()) and load_state_dict give the connector again", detail)


def _rebuild(connector: Connector, spec: TokenSpec) -> Connector:
    if isinstance(connector, Wrapper):
        inner = _rebuild(connector.inner, spec)
        return type(connector).build(spec, connector.out_spec(spec).dim, inner=inner, **connector.options())
    if not isinstance(connector, Chain):
        return type(connector).build(spec, connector.out_spec(spec).dim, **connector.options())
    links = []
    for link in connector.connectors:
        links.append(_rebuild(link, spec))
        spec = link.out_spec(spec)
    return Chain(*links)


def _check_packed(model: Connector, spec: TokenSpec) -> None:
    turned = spec if spec.grid is None else replace(spec, grid=(spec.grid[1], spec.grid[0]))
    # Native encoders give CLS and registers too, whatever the spec in hand has.
    for num_prefix in {0, spec.num_prefix, 2}:
        specs = [replace(each, num_prefix=num_prefix) for each in (spec, turned, spec)]
        taken = [each for each in specs if _takes(model, each)]
        if taken:
            _check_pack(model, [_random_tokens(each, 1, torch.float32, seed) for seed, each in enumerate(taken)])


def _check_pack(model: Connector, visuals: Sequence[VisualTokens]) -> None:
    clause = "packed equals one at a time"
    with torch.no_grad():
        parts = model.forward_packed(PackedTokens.join(visuals)).split()
        if len(parts) != len(visuals):
            raise _broken(model, clause, f"{len(visuals)} images came, {len(parts)} went")
        for part, visual in zip(parts, visuals, strict=True):
            alone = _run(model, visual)
            if alone.spec != part.spec:
                raise _broken(model, clause, f"{alone.spec} alone, {part.spec} packed")
            _require_close(model, clause, part.tokens, alone.tokens)
            if part.prefix is not None and alone.prefix is not None:
                _require_close(model, clause, part.prefix, alone.prefix)


def _takes(model: Connector, spec: TokenSpec) -> bool:
    try:
        model.out_spec(spec)
    except TokenShapeError:
        return False
    return True


def _random_tokens(spec: TokenSpec, batch: int, dtype: torch.dtype, seed: int = 0) -> VisualTokens:
    generator = _generator(seed)
    tokens = torch.randn(batch, spec.num_tokens, spec.dim, generator=generator).to(dtype)
    if spec.num_prefix == 0:
        return VisualTokens(tokens, spec.grid)
    prefix = torch.randn(batch, spec.num_prefix, spec.dim, generator=generator).to(dtype)
    return VisualTokens(tokens, spec.grid, prefix)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _run(model: Connector, visual: VisualTokens) -> VisualTokens:
    try:
        out: VisualTokens = model(visual)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        told = f"{visual.spec} in {visual.tokens.dtype} gave: {error}"
        advice = "out_spec must refuse what forward cannot take, another width by self.require_dim(spec, in_dim)"
        raise _broken(model, "forward takes what out_spec takes", f"{told}; {advice}") from error
    return out


def _same(new: Tensor | None, old: Tensor | None) -> bool:
    return new is old if new is None or old is None else torch.equal(new, old)


def _require_close(model: Connector, clause: str, got: Tensor, wanted: Tensor) -> None:
    if got.shape != wanted.shape:
        raise _broken(model, clause, f"shapes {tuple(got.shape)} and {tuple(wanted.shape)} differ")
    if not torch.allclose(got, wanted, rtol=1e-4, atol=1e-5):
        raise _broken(model, clause, f"outputs differ by up to {(got - wanted).abs().max():.2g}")


def _broken(model: Connector, clause: str, detail: str) -> VlmError:
    links = "+".join(link.name or type(link).__name__ for link in model.connectors) if isinstance(model, Chain) else ""
    return VlmError(f"'{links or model.name or type(model).__name__}' breaks the clause '{clause}': {detail}")
