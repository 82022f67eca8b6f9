"""SHA-256 of tensors: the proof that a frozen part did not move."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["module_hash"]


def module_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors by name, dtype, shape and bytes, in the order of their names.

    Each tensor has a digest of its own, so that large models are hashed on all cores.
    """
    names = sorted(tensors)
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(names, pool.map(_digest, (tensors[name] for name in names)), strict=True):
            whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
