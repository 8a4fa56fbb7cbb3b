"""The paged KV cache: two tensors a layer, and how many blocks of them a device can hold.

Layout of each tensor: [num_blocks, num_kv_heads, block_size, head_dim], as `minivllm.ops.store_kv` documents it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minivllm.config import ModelConfig
from minivllm.errors import ConfigError

CPU_CACHE_BYTES = 4 << 30


class LayerKV(NamedTuple):
    """One layer's keys and values, each [num_blocks, num_kv_heads, block_size, head_dim]."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers. Unwritten slots hold anything; attention never reads them."""

    layers: list[LayerKV]
    num_blocks: int
    block_size: int

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        shape = (num_blocks, config.num_key_value_heads, block_size, config.head_dim)

        def tensor() -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls([LayerKV(tensor(), tensor()) for _ in range(config.num_hidden_layers)], num_blocks, block_size)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers, keys and values."""
    per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return per_token * block_size


def cpu_cache_bytes(bytes_per_block: int, max_model_len: int, block_size: int) -> int:
    """Bytes for the cache on a CPU: 4 GiB, or one whole sequence where that is more, within the machine's memory.

    Pages of it that are never written cost nothing.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    one_sequence = -(-max_model_len // block_size) * bytes_per_block
    return min(max(CPU_CACHE_BYTES, one_sequence), physical)


def blocks_that_fit(
    free_bytes: int, bytes_per_block: int, most_useful: int, max_model_len: int, block_size: int
) -> int:
    """How many blocks to allocate from `free_bytes`; more than `most_useful` could never be filled.

    Raises:
        ConfigError: not even one sequence of max_model_len fits.
    """
    fitting = min(free_bytes // bytes_per_block, most_useful)
    needed = -(-max_model_len // block_size)
    if fitting < needed:
        missing = (needed * bytes_per_block - max(free_bytes, 0)) / 2**30
        raise ConfigError(
            f"the KV cache of one sequence of max_model_len={max_model_len} tokens needs {needed} blocks, but only "
            f"{max(fitting, 0)} fit ({missing:.2f} GiB are missing). Lower max_model_len to "
            f"{max(fitting, 0) * block_size}, or raise gpu_memory_utilization on a GPU"
        )
    return fitting
