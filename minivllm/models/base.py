"""What the runner and the weight loader ask of every model family."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from minivllm.runner.forward_batch import ForwardBatch
    from minivllm.runner.kv_cache import KVCache


class CausalLM(nn.Module):
    """A decoder that predicts the next token.

    fused_weights: our module name -> the checkpoint's names, in row order, that are stacked in it.
    unused_weights: suffixes of checkpoint names that a checkpoint may hold and the model does not need.
    """

    fused_weights: ClassVar[dict[str, tuple[str, ...]]]
    unused_weights: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, fwd: ForwardBatch, kv: KVCache) -> Tensor:
        """Hidden states [num_tokens, hidden_size] of a step; writes its keys and values into `kv`."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size], in the model's dtype."""
