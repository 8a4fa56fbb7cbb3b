"""Loads a model, holds its KV cache, and computes batches: `launch(batch)` starts a step, `Pending.wait()` gives its
token ids.

The two verbs are apart so that the next step can be scheduled, and launched, while this one runs on the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minivllm.batch import Batch
from minivllm.config import EngineConfig, ModelConfig
from minivllm.errors import ConfigError, RequestError
from minivllm.models import build_model, weights
from minivllm.runner import sampler
from minivllm.runner.forward_batch import ForwardBatch
from minivllm.runner.input_builder import InputBuilder
from minivllm.runner.kv_cache import KVCache, block_bytes, blocks_that_fit, cpu_cache_bytes


@dataclass(frozen=True)
class Pending:
    """A launched step. `wait()` blocks until its ids are on the host: one for each entry of `Batch.samples`, in
    order."""

    ids: Tensor  # [S] int64 in host memory, complete once `ready` has happened
    ready: torch.cuda.Event | None

    def wait(self) -> list[int]:
        if self.ready is not None:
            self.ready.synchronize()
        ids: list[int] = self.ids.tolist()
        return ids


class ModelRunner:
    """One model on one device."""

    def __init__(self, folder: Path, model_config: ModelConfig, config: EngineConfig) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, model_config.dtype, self.device)
        self.model_config = model_config
        self.block_size = config.block_size
        self.max_model_len = config.resolve_max_model_len(model_config)
        self.load_seconds = self._load(folder, config)
        max_blocks = -(-self.max_model_len // config.block_size)
        num_blocks = config.num_kv_blocks or self._fitting_blocks(config)
        self.kv = KVCache.allocate(model_config, num_blocks, config.block_size, dtype=self.dtype, device=self.device)
        self.inputs = InputBuilder(config.max_num_seqs, max_blocks, config.block_size, self.device)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Pending:
        """Compute the batch's tokens, write their keys and values, and draw. Returns at once on a GPU."""
        fwd, sampling = self.inputs.build(batch)
        hidden = self.model(fwd, self.kv)
        if sampling is None:
            return Pending(torch.empty(0, dtype=torch.int64), None)
        ids = sampler.draw(self.model.logits(hidden.index_select(0, fwd.sample_indices)), sampling)
        # A failed row (-1) ends at the update; until then its slot must still hold a valid id.
        self.inputs.keep_last_tokens(sampling.slots, ids.clamp(min=0))
        if self.device.type == "cpu":
            return Pending(ids, None)
        on_host = torch.empty_like(ids, device="cpu", pin_memory=True)
        on_host.copy_(ids, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        return Pending(on_host, ready)

    @torch.inference_mode()
    def prompt_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Teacher-forced logits of one sequence, float32 [len(token_ids), vocab_size], for evaluation and tests.

        It computes beside the running batch, with a KV cache of its own.

        Raises:
            RequestError: no ids, more than max_model_len, or an id outside the vocabulary.
        """
        if not 1 <= len(token_ids) <= self.max_model_len:
            raise RequestError(
                f"the sequence has {len(token_ids)} tokens; it must have 1 to max_model_len={self.max_model_len}"
            )
        if min(token_ids) < 0 or max(token_ids) >= self.model_config.vocab_size:
            raise RequestError(f"a token id is outside [0, {self.model_config.vocab_size}), the model's vocabulary")
        fwd, kv = self._single_sequence(torch.tensor(list(token_ids), device=self.device))
        logits: Tensor = self.model.logits(self.model(fwd, kv))
        return logits.float()

    def _load(self, folder: Path, config: EngineConfig) -> float:
        start = time.monotonic()
        model = build_model(self.model_config, self.max_model_len, dtype=self.dtype, device=self.device)
        if config.load_format == "dummy":
            weights.fill_random(model, config.seed)
        else:
            weights.load(model, folder)
        weights.pack(model)
        self.model = model.eval()
        return time.monotonic() - start

    def _single_sequence(self, token_ids: Tensor) -> tuple[ForwardBatch, KVCache]:
        """The tensors and a fresh cache for one sequence whose tokens are all queries."""
        length, device = len(token_ids), self.device
        num_blocks = -(-length // self.block_size)
        kv = KVCache.allocate(self.model_config, num_blocks, self.block_size, dtype=self.dtype, device=device)
        positions = torch.arange(length, device=device)
        fwd = ForwardBatch(
            input_ids=token_ids,
            positions=positions,
            slot_mapping=positions,
            block_tables=torch.arange(num_blocks, dtype=torch.int32, device=device).unsqueeze(0),
            seq_lens=torch.tensor([length], dtype=torch.int32, device=device),
            cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32, device=device),
            max_seqlen_q=length,
            sample_indices=torch.tensor([length - 1], device=device),
        )
        return fwd, kv

    def _fitting_blocks(self, config: EngineConfig) -> int:
        bytes_per_block = block_bytes(self.model_config, config.block_size, self.dtype)
        most_useful = config.max_num_seqs * -(-self.max_model_len // config.block_size)
        if self.device.type == "cpu":
            free = cpu_cache_bytes(bytes_per_block, self.max_model_len, config.block_size)
        else:
            free = self._free_after_peak(config)
        return blocks_that_fit(free, bytes_per_block, most_useful, self.max_model_len, config.block_size)

    def _free_after_peak(self, config: EngineConfig) -> int:
        """GPU bytes for the cache: the allowed share, less all that is in use and the peak of the largest step's
        activations."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._run_largest_step(config)
        activations = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return int(config.gpu_memory_utilization * total) - (total - free) - activations

    @torch.inference_mode()
    def _run_largest_step(self, config: EngineConfig) -> None:
        length = min(config.max_num_batched_tokens, self.max_model_len)
        fwd, kv = self._single_sequence(torch.zeros(length, dtype=torch.int64, device=self.device))
        hidden = self.model(fwd, kv)
        self.model.logits(hidden[: config.max_num_seqs]).float()


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: a GPU is asked for that this machine or this build of torch does not have.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        raise ConfigError(
            f"device={name!r} asks for GPU {index}, but torch {torch.__version__} sees {count} GPUs; use device='cpu'"
        )
    return torch.device("cuda", index)


def resolve_dtype(name: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's dtype on a GPU and float32 on a CPU, where narrow types save memory but not time.

    Raises:
        ConfigError: bfloat16 on a GPU without it.
    """
    if name == "auto":
        name = "float32" if device.type == "cpu" else checkpoint
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        raise ConfigError("dtype=bfloat16 needs a GPU of compute capability 8.0 or later; use dtype='float16'")
    return dtype
