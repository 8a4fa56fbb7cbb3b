"""Token embedding, and its use as the output head where a model ties the two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivllm.ops import pack_linear_weight, packed_linear, prefers_packed


class Embedding(nn.Module):
    """Rows of a table: ids [num_tokens] -> [num_tokens, hidden_size]. `is_head`: it is the output head as well."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, is_head: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.is_head = is_head
        self.packed: Tensor | None = None

    def pack(self) -> None:
        """As `Linear.pack`, for the head; the table stays for the look-up."""
        if self.is_head and prefers_packed(self.weight):
            self.packed = pack_linear_weight(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def as_head(self, hidden: Tensor) -> Tensor:
        """Logits of a tied head: hidden [num_rows, hidden_size] -> [num_rows, vocab_size]."""
        if self.packed is None:
            return F.linear(hidden, self.weight)
        return packed_linear(hidden, self.packed, self.weight.shape[0])
