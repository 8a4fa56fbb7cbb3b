"""A decoder layer of minivllm's ops under torch.compile, checked against plain PyTorch; on a GPU or a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from minivllm import ops

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, EPS = 4, 2, 32, 128, 1e-6


class Layer(nn.Module):
    """x: [tokens, hidden] of sequences one after the other, where `starts` [batch + 1] says; each attends to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Parameter(torch.rand(2, HIDDEN) + 0.5)
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.o = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.gate_up, self.down = nn.Linear(HIDDEN, 512, bias=False), nn.Linear(256, HIDDEN, bias=False)

    def forward(self, x: Tensor, positions: Tensor, starts: Tensor, longest: int, table: Tensor) -> Tensor:
        residual = x.clone()
        packed = self.qkv(ops.rms_norm(x, self.norms[0], EPS)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = (part.contiguous() for part in packed.split((HEADS, KV_HEADS, KV_HEADS), dim=1))
        ops.apply_rope(q, k, positions, table)
        seen = ops.flash_attention(q, k, v, starts, starts, longest, longest, scale=HEAD_DIM**-0.5)
        x = self.o(seen.flatten(1))
        ops.fused_add_rms_norm(x, residual, self.norms[1], EPS)
        return residual + self.down(ops.silu_and_mul(self.gate_up(x)))

    def plain(self, x: Tensor, table: Tensor) -> Tensor:
        """The same for one sequence, without minivllm's ops."""
        qkv = self.qkv(functional.rms_norm(x, (HIDDEN,), self.norms[0], EPS)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.transpose(0, 1).split((HEADS, KV_HEADS, KV_HEADS))  # each [heads, tokens, head_dim]
        cos, sin = (half.repeat(1, 2) for half in table[: len(x)].chunk(2, dim=-1))
        q, k = (t * cos + torch.cat((-t[..., HEAD_DIM // 2 :], t[..., : HEAD_DIM // 2]), -1) * sin for t in (q, k))
        seen = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
        x = x + self.o(seen[0].transpose(0, 1).flatten(1))
        gate, up = self.gate_up(functional.rms_norm(x, (HIDDEN,), self.norms[1], EPS)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


@torch.inference_mode()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer, lengths = Layer().to(device), (5, 1, 12)
    table = ops.rope_cos_sin_cache(HEAD_DIM, 64, device=device)
    x = torch.randn(sum(lengths), HIDDEN, device=device)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    starts = torch.tensor([0, 5, 6, 18], dtype=torch.int32, device=device)
    got = torch.compile(layer, fullgraph=True)(x, positions, starts, max(lengths), table)
    torch.testing.assert_close(got, torch.cat([layer.plain(part, table) for part in x.split(lengths)]))
    print(f"compiled layer of minivllm's ops == plain PyTorch on {device}")


if __name__ == "__main__":
    main()
