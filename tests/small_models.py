"""Random small Qwen3 checkpoints, written by `transformers`, whose float32 results are the oracle for ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

# Shapes that differ in what can go wrong: group size, head_dim apart from hidden_size, tied or not, one KV head, odd
# sizes.
SHAPES: dict[str, dict[str, Any]] = {
    "gqa-tied": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "wide-heads-untied": {
        "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
        "tie_word_embeddings": False,
    },
    "mha-long-theta": {
        "hidden_size": 80, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64,
        "rope_theta": 1_000_000.0,
    },
    "group-of-8": {
        "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 72,
    },
}  # fmt: skip


def make_checkpoint(folder: Path, shape: str, seed: int, *, max_shard_size: str = "5GB") -> Qwen3ForCausalLM:
    """Write a float32 checkpoint with fresh weights into `folder` and return the model that wrote it."""
    options = {"tie_word_embeddings": True, "intermediate_size": 96, "rope_theta": 10_000.0, **SHAPES[shape]}
    theta = options.pop("rope_theta")
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=199,
        num_hidden_layers=3,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        initializer_range=0.1,  # larger than usual: random logits far enough apart for greedy tokens to be comparable
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        use_sliding_window=False,
        **options,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@torch.no_grad()
def exact_logits(model: Qwen3ForCausalLM, ids: list[int]) -> torch.Tensor:
    """Teacher-forced logits [len(ids), vocab_size] of `transformers`."""
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@torch.no_grad()
def greedy(model: Qwen3ForCausalLM, ids: list[int], num_tokens: int) -> list[int]:
    """The next `num_tokens` most likely tokens, one forward pass a token without any cache."""
    sequence = list(ids)
    for _ in range(num_tokens):
        sequence.append(int(exact_logits(model, sequence)[-1].argmax()))
    return sequence[len(ids) :]


@torch.no_grad()
def greedy_all(model: Qwen3ForCausalLM, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """`greedy` of many prompts at once; the padding behind a shorter one is nothing that its tokens look at."""
    sequences = [list(prompt) for prompt in prompts]
    for _ in range(num_tokens):
        padded = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            padded[row, : len(sequence)] = torch.tensor(sequence)
        last = torch.tensor([len(sequence) - 1 for sequence in sequences])
        logits = model(padded).logits[torch.arange(len(sequences)), last]
        for sequence, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
            sequence.append(token)
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]
