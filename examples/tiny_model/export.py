"""Judging the trained tiny model and writing its folder: weights, configs, tokenizer, and the model card.

Generation here has no KV cache: rows are padded on the right, where causal attention never looks, so one buffer of
ids serves a whole batch of prompts of different lengths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from safetensors.torch import save_file
from tiny_tasks import KINDS, held_out_dialogues
from torch import Tensor

from tiny_model.data import NUM_RANKS, PATTERN, SPECIAL_TOKENS, encode_dialogue, save_ranks
from tiny_model.net import NetConfig, TinyQwen3

STORY_PROMPT, CHAT_ASKS = "Once upon a time", ("Hello!", "Who are you?", "Tell me a story.")
TEMPERATURE, TOP_P = 0.8, 0.9  # of six settings tried, one of the two that repeated four-grams least
END_OF_TEXT, ASSISTANT, END = NUM_RANKS, NUM_RANKS + 3, NUM_RANKS + 4
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role ' ~ message['role'] ~ ': expected system, user or assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@torch.no_grad()
def round_to_bfloat16(model: TinyQwen3) -> None:
    """Round the weights in place to what the file will hold, so that the judged model is the written one."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().to(parameter.dtype))


@torch.no_grad()
def next_token_loss(model: TinyQwen3, stream: np.ndarray, length: int, max_windows: int | None = None) -> float:
    """Sum of nats over a stream cut into windows of `length`, divided by the tokens predicted."""
    device = model.model.embed_tokens.weight.device
    starts = range(0, len(stream) - 1, length)
    total, count = 0.0, 0
    for start in list(starts)[:max_windows]:
        ids = torch.from_numpy(stream[start : start + length + 1].astype(np.int64))[None].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total += model(ids[:, :-1], ids[:, 1:]).sum().item()
        count += ids.shape[1] - 1
    return total / count


@torch.no_grad()
def generate(
    model: TinyQwen3, prompts: Sequence[list[int]], max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """New ids of each prompt up to an end token: greedy at temperature 0, else nucleus sampling with TOP_P."""
    device = model.model.embed_tokens.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.full((len(prompts), int(lengths.max()) + max_tokens), END_OF_TEXT, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows, done = torch.arange(len(prompts), device=device), torch.zeros(len(prompts), dtype=torch.bool, device=device)
    random = torch.Generator(device).manual_seed(seed)
    for step in range(max_tokens):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = model.model(ids[:, : int(lengths.max()) + step])
            logits = model.logits(hidden[rows, lengths + step - 1]).float()
        new = logits.argmax(-1) if temperature == 0 else sample_nucleus(logits / temperature, TOP_P, random)
        ids[rows, lengths + step] = torch.where(done, END_OF_TEXT, new)
        done |= (new == END) | (new == END_OF_TEXT)
        if bool(done.all()):
            break
    tails = [row[length:].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)]
    return [tail[: next((i for i, t in enumerate(tail) if t in (END, END_OF_TEXT)), len(tail))] for tail in tails]


def sample_nucleus(logits: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """One id a row from the smallest set of likeliest tokens whose probability reaches `top_p`."""
    probs, order = logits.softmax(-1).sort(descending=True)
    probs = probs * (probs.cumsum(-1) - probs < top_p)
    return order.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def task_accuracy(model: TinyQwen3, encoding: tiktoken.Encoding, per_kind: int, seed: int = 0) -> dict[str, float]:
    """Share of held-out tasks of each kind that are answered exactly, greedily."""
    dialogues = [(kind, d) for kind in KINDS for d in held_out_dialogues(kind, per_kind, seed)]
    right = dict.fromkeys(KINDS, 0)
    for at in range(0, len(dialogues), 300):
        chunk = dialogues[at : at + 300]
        prompts = [[*encode_dialogue(encoding, d[:-1])[0], ASSISTANT] for _, d in chunk]
        longest = max(len(encoding.encode_ordinary(d[-1]["content"])) for _, d in chunk)
        for (kind, dialogue), new in zip(chunk, generate(model, prompts, longest + 2), strict=True):
            right[kind] += encoding.decode(new).strip() == dialogue[-1]["content"]
    return {kind: count / per_kind for kind, count in right.items()}


def judge(
    model: TinyQwen3, encoding: tiktoken.Encoding, held_out: dict[str, list[str]], per_kind: int, length: int
) -> dict[str, Any]:
    """Held-out perplexity and bits per byte of each text group, accuracy per kind, and samples."""
    model.eval()
    results: dict[str, Any] = {"text": {}}
    for group, texts in held_out.items():
        stream = np.concatenate([[END_OF_TEXT, *encoding.encode_ordinary(t)] for t in texts])
        nats, size = next_token_loss(model, stream, length), sum(len(t.encode()) for t in texts)
        bits = nats * (len(stream) - 1) / math.log(2) / size
        results["text"][group] = {"perplexity": math.exp(nats), "bits_per_byte": bits, "tokens": len(stream)}
    results["accuracy"] = task_accuracy(model, encoding, per_kind)
    results["overall"] = sum(results["accuracy"].values()) / len(results["accuracy"])
    return results | samples(model, encoding)


def samples(model: TinyQwen3, encoding: tiktoken.Encoding) -> dict[str, Any]:
    """Three continuations of "Once upon a time" and the answers of three short chats."""
    prompt = encoding.encode_ordinary(STORY_PROMPT)
    stories = generate(model, [prompt] * 3, 160, TEMPERATURE, seed=1)
    turns = [encode_dialogue(encoding, [{"role": "user", "content": ask}])[0] for ask in CHAT_ASKS]
    answers = generate(model, [[*turn, ASSISTANT] for turn in turns], 160, TEMPERATURE, seed=2)
    return {
        "samples": [STORY_PROMPT + encoding.decode(story) for story in stories],
        "chats": [[ask, encoding.decode(answer)] for ask, answer in zip(CHAT_ASKS, answers, strict=True)],
    }


def model_config(config: NetConfig) -> dict[str, Any]:
    """config.json in Hugging Face's terms."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        **asdict(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END,
        "pad_token_id": NUM_RANKS + 5,
    }


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json: the pattern, the special tokens and the chat template."""
    tokens = {str(NUM_RANKS + i): {"content": text, "special": True} for i, text in enumerate(SPECIAL_TOKENS)}
    return {
        "tokenizer_class": "TiktokenTokenizer",
        "pattern": PATTERN,
        "added_tokens_decoder": tokens,
        "bos_token": None,
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": NetConfig.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }


def write_folder(folder: Path, model: TinyQwen3, config: NetConfig, ranks: dict[bytes, int], card: str) -> None:
    """Write the complete model folder in Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = {"eos_token_id": [END, END_OF_TEXT], "do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P}
    for name, value in (
        ("config.json", model_config(config)),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config()),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    save_ranks(ranks, folder / "tokenizer.tiktoken")
    (folder / "README.md").write_text(card, "utf-8")
    tensors = {name: tensor.detach().cpu().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
