"""Loads a model, holds its KV cache, and computes batches: `launch(batch)` starts a step, `Pending.wait()` gives its
results.

The two verbs are apart so that the next step can be scheduled, and launched, while this one runs on the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minivllm.batch import Batch, BatchResult
from minivllm.config import EngineConfig, ModelConfig
from minivllm.errors import ConfigError, RequestError
from minivllm.models import build_model, weights
from minivllm.ops import copy_blocks, plan_paged_attention
from minivllm.runner import sampler
from minivllm.runner.columns import ints, upload
from minivllm.runner.forecast import fullest_batch
from minivllm.runner.forward_batch import ForwardBatch, SamplingBatch
from minivllm.runner.input_builder import InputBuilder
from minivllm.runner.kv_cache import KVCache, block_bytes, blocks_that_fit, cpu_cache_bytes
from minivllm.runner.logits_editor import LogitsEditor
from minivllm.runner.readouts import Readout, Readouts


@dataclass(frozen=True)
class Pending:
    """A launched step. tensors: the drawn ids, then those of readout, in host memory, complete once `ready` has
    happened."""

    tensors: list[Tensor]
    readout: Readout | None
    ready: torch.cuda.Event | None

    def wait(self) -> BatchResult:
        """Block until the step's results are on the host; returns them in plain values."""
        if self.ready is not None:
            self.ready.synchronize()
        result = BatchResult(self.tensors[0].tolist())
        if self.readout is not None:
            self.readout.fill(result, self.tensors[1:])
        return result


class ModelRunner:
    """One model on one device."""

    def __init__(self, folder: Path, model_config: ModelConfig, config: EngineConfig) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, model_config.dtype, self.device)
        self.model_config = model_config
        self.block_size = config.block_size
        self.max_model_len = config.resolve_max_model_len(model_config)
        self.load_seconds = self._load(folder, config)
        self._clear_slots(config)
        num_blocks = config.num_kv_blocks or self._fitting_blocks(config)
        self.kv = KVCache.allocate(model_config, num_blocks, config.block_size, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Pending:
        """Copy the batch's blocks, compute its tokens, write their keys and values, and draw. Returns at once on a
        GPU."""
        fwd, sampling = self.inputs.build(batch)
        if batch.copy_sources:
            sources, targets = upload([ints(batch.copy_sources), ints(batch.copy_targets)], self.device)
            for layer in self.kv.layers:
                copy_blocks(layer.k, layer.v, sources, targets)
        return self._finish(batch, self.model(self._planned(fwd), self.kv), fwd.sample_indices, sampling)

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

    def _finish(self, batch: Batch, hidden: Tensor, sample_indices: Tensor, sampling: SamplingBatch | None) -> Pending:
        """All of a step that follows the model: hidden [T, hidden_size] -> ids, and what is told beside them."""
        edits, readout = self.editor.begin(batch), self.readouts.begin(batch)
        if readout is not None:
            self.readouts.read_hidden(readout, hidden, self.model.logits)
        if sampling is None:
            return self._to_host(torch.empty(0, dtype=torch.int64), readout)
        logits = self.model.logits(hidden.index_select(0, sample_indices))
        if readout is not None:
            self.readouts.keep_logits(readout, logits)
        if edits is not None:
            logits = self.editor.edit(edits, logits)
        ids = sampler.draw(logits, sampling)
        if edits is not None:
            self.editor.drawn(edits, ids)
        if readout is not None:
            self.readouts.read_ids(readout, ids)
        # A failed row (-1) ends at the update; until then its slot must still hold a valid id.
        self.inputs.keep_last_tokens(sampling.slots, ids.clamp(min=0))
        return self._to_host(ids, readout)

    def _planned(self, fwd: ForwardBatch) -> ForwardBatch:
        """With one plan for the decode attention of all layers; there is nothing to plan on a CPU."""
        if self.device.type == "cpu":
            return fwd
        config = self.model_config
        plan = plan_paged_attention(
            fwd.seq_lens,
            fwd.cu_seqlens_q,
            fwd.max_seqlen_q,
            max_seqlen_k=fwd.block_tables.shape[1] * self.block_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
        return replace(fwd, attention_plan=plan)

    def _to_host(self, ids: Tensor, readout: Readout | None) -> Pending:
        tensors = [ids] if readout is None else [ids, *readout.tensors]
        if all(tensor.is_cpu for tensor in tensors):
            return Pending(tensors, readout, None)
        on_host = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
        for target, tensor in zip(on_host, tensors, strict=True):
            target.copy_(tensor, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        return Pending(on_host, readout, ready)

    def _clear_slots(self, config: EngineConfig) -> None:
        """Begin with slots of which nothing is known."""
        max_blocks = -(-self.max_model_len // config.block_size)
        vocab_size, hidden_size = self.model_config.vocab_size, self.model_config.hidden_size
        self.inputs = InputBuilder(config.max_num_seqs, max_blocks, config.block_size, self.device)
        self.editor = LogitsEditor(vocab_size, self.device)
        self.readouts = Readouts(vocab_size, hidden_size, self.device)

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
        return self._planned(fwd), kv

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
        """Allocate what the most demanding step can need: the longest piece of a prompt, then `fullest_batch`."""
        length = min(config.max_num_batched_tokens, self.max_model_len)
        self.model(*self._single_sequence(torch.zeros(length, dtype=torch.int64, device=self.device)))
        batch = fullest_batch(
            config.max_num_seqs, config.max_num_batched_tokens, self.max_model_len, self.model_config.vocab_size
        )
        fwd, sampling = self.inputs.build(batch)
        shape = (config.max_num_batched_tokens, self.model_config.hidden_size)
        hidden = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._finish(batch, hidden, fwd.sample_indices, sampling)
        self._clear_slots(config)


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
