"""Token embedding, and its use as the output head where a model ties the two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivllm.layers.linear import dense


class Embedding(nn.Module):
    """Rows of a table: ids [num_tokens] -> [num_tokens, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(vocab_size, hidden_size, dtype=dtype, device=device), requires_grad=False
        )

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def as_head(self, hidden: Tensor) -> Tensor:
        """Logits of a tied head: hidden [num_rows, hidden_size] -> [num_rows, vocab_size]."""
        return dense(hidden, self.weight)
