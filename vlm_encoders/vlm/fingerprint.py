"""SHA-256 of tensors: the proof that a frozen part did not move."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["joined_hash", "module_hash", "tensor_hashes"]


def module_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors by name, dtype, shape and bytes, in the order of their names."""
    return joined_hash(tensor_hashes(tensors))


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hash each tensor by dtype, shape and bytes, so that large models are hashed on all cores."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))


def joined_hash(hashes: Mapping[str, str]) -> str:
    """Give one hash of the hashes of tensors, in the order of their names."""
    whole = hashlib.sha256()
    for name in sorted(hashes):
        whole.update(f"{name} {hashes[name]}\n".encode())
    return whole.hexdigest()


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
