"""Initial weights, drawn from a generator of their own on the CPU.

A connector starts from the same numbers whatever was drawn before it, on whatever
device it is built, and building it leaves the global generator as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

__all__ = ["Draw", "conv2d", "embedding", "is_drawing", "linear", "undrawn"]

_DRAWING: ContextVar[bool] = ContextVar("drawing", default=True)


@contextmanager
def undrawn() -> Iterator[None]:
    """Leave the weights of connectors that are built inside undrawn: whoever builds them draws or loads them next."""
    before = _DRAWING.set(False)
    try:
        yield
    finally:
        _DRAWING.reset(before)


def is_drawing() -> bool:
    """Say whether a connector that is built now draws its weights itself."""
    return _DRAWING.get()


def linear(in_dim: int, out_dim: int, bias: bool = True) -> nn.Linear:  # noqa: FBT001, FBT002 - as nn.Linear
    """Make a linear map whose weights hold nothing yet; `init_weights` draws them."""
    made = nn.utils.skip_init(nn.Linear, in_dim, out_dim, bias=bias, device=torch.get_default_device())
    assert isinstance(made, nn.Linear)
    return made


def conv2d(
    in_dim: int,
    out_dim: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    bias: bool = True,
) -> nn.Conv2d:
    """Make a convolution whose weights hold nothing yet; `init_weights` draws them."""
    shape = {"stride": stride, "padding": padding, "groups": groups, "bias": bias}
    made = nn.utils.skip_init(nn.Conv2d, in_dim, out_dim, kernel, **shape, device=torch.get_default_device())
    assert isinstance(made, nn.Conv2d)
    return made


def embedding(count: int, dim: int) -> nn.Embedding:
    """Make a table whose rows hold nothing yet; `init_weights` draws them."""
    # skip_init draws on the meta device first, which for a table imports all of torch's compiler.
    made: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(count, dim), freeze=False)
    return made


class Draw:
    """Draws initial weights in place, in order, from one seed.

    Args:
        seed: of the generator, which nothing else uses.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, tensor: Tensor, std: float = 1.0) -> None:
        """Draw N(0, std)."""
        self._copy(tensor, lambda drawn: nn.init.normal_(drawn, std=std, generator=self.generator))

    def trunc_normal(self, tensor: Tensor, std: float) -> None:
        """Draw N(0, std), cut at -2 and 2 as `nn.init.trunc_normal_` does by default."""
        self._copy(tensor, lambda drawn: nn.init.trunc_normal_(drawn, std=std, generator=self.generator))

    def uniform(self, tensor: Tensor, bound: float) -> None:
        """Draw evenly from -bound to bound."""
        self._copy(tensor, lambda drawn: nn.init.uniform_(drawn, -bound, bound, generator=self.generator))

    def xavier_uniform(self, tensor: Tensor) -> None:
        """Draw as `nn.init.xavier_uniform_`."""
        self._copy(tensor, lambda drawn: nn.init.xavier_uniform_(drawn, generator=self.generator))

    def kaiming_normal(self, tensor: Tensor, *, fan: str = "fan_in", nonlinearity: str = "relu") -> None:
        """Draw as `nn.init.kaiming_normal_`."""

        def draw(drawn: Tensor) -> Tensor:
            return nn.init.kaiming_normal_(drawn, mode=fan, nonlinearity=nonlinearity, generator=self.generator)  # type: ignore[arg-type]

        self._copy(tensor, draw)

    def modules(self, root: nn.Module, *, std: float | None = None) -> None:
        """Draw every linear map, convolution and table below `root`; norms start at one and zero.

        What else has parameters is left as it is: it might draw from the global generator.

        Args:
            root: the module; parameters that it holds directly are its own to draw.
            std: None for what `nn.Linear` and `nn.Conv2d` draw themselves; a number for
                N(0, std) with zero biases, as BERT and its followers start.
        """
        for module in root.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                self._affine(module, std)
            elif isinstance(module, nn.Embedding):
                self.normal(module.weight, 1.0 if std is None else std)
            elif _is_norm(module) and callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def _affine(self, module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, std: float | None) -> None:
        if std is not None:
            self.normal(module.weight, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            return
        # nn.Linear draws kaiming_uniform_(a=sqrt(5)), which is a bound of 1 / sqrt(fan in).
        bound = 1 / math.sqrt(module.weight[0].numel())
        self.uniform(module.weight, bound)
        if module.bias is not None:
            self.uniform(module.bias, bound)

    @torch.no_grad()
    def _copy(self, tensor: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
        if not tensor.is_meta:
            tensor.copy_(draw(torch.empty(tensor.shape, dtype=torch.float32, device="cpu")))


def _is_norm(module: nn.Module) -> bool:
    """Say whether a module starts without drawing: norms have a scale and a shift for each channel, no matrix."""
    own = list(module.parameters(recurse=False))
    return bool(own) and all(each.ndim < 2 for each in own) and not hasattr(module, "init_weights")
