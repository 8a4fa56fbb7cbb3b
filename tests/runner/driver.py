"""Sequences that a `ModelRunner` computes in hand-made batches, and what their logits must become, in plain Python."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minivllm.batch import Batch, BatchResult, SlotExtras, SlotParams, TokenLogprobs
from minivllm.config import EngineConfig, ModelConfig
from minivllm.runner.model_runner import ModelRunner, Pending

BLOCK = 8
VOCAB = 199  # of tests/small_models.py


def edited(logits: list[float], extras: SlotExtras, tokens: list[int]) -> list[float]:
    """The logits of the token after `tokens`, changed as `extras` says, by its words and nothing else."""
    output, biases = tokens[extras.num_prompt_tokens :], dict(extras.logit_bias)
    result = []
    for token, logit in enumerate(logits):
        if token in tokens:
            logit = logit / extras.repetition_penalty if logit > 0 else logit * extras.repetition_penalty
        if token in output:
            logit -= extras.presence_penalty + extras.frequency_penalty * output.count(token)
        logit += biases.get(token, 0.0)
        banned = extras.allowed_token_ids is not None and token not in extras.allowed_token_ids
        banned |= len(output) < extras.min_tokens and token in extras.stop_ids
        for *beginning, last in extras.bad_words:
            banned |= token == last and beginning == tokens[max(0, len(tokens) - len(beginning)) :]
        result.append(-torch.inf if banned else logit)
    return result


def random_wants(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Keyword arguments of `SlotExtras` that edit logits; each is there or not."""

    def ids(most: int, least: int = 1) -> tuple[int, ...]:
        return tuple(rng.sample(range(vocab), rng.randint(least, most)))

    choices: dict[str, Any] = {
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
        "repetition_penalty": rng.uniform(0.2, 3),
        "logit_bias": tuple((token, rng.uniform(-5, 5)) for token in ids(4)),
        "allowed_token_ids": ids(vocab - 4, vocab // 2),
        "bad_words": tuple(
            tuple(rng.choices(range(vocab), k=rng.choice([1, 2, 2, 2, 3, 5]))) for _ in range(rng.choice([1, 20, 60]))
        ),
        "min_tokens": rng.randint(1, 8),
    }
    chosen = {name: value for name, value in choices.items() if rng.random() < 0.4}
    if "min_tokens" in chosen:
        chosen["stop_ids"] = ids(3)
    return chosen


@dataclass(eq=False)
class Sequence:
    """tokens: the prompt and what was drawn. num_scheduled: tokens that batches were launched for. told: logprobs of
    the drawn tokens, scored: of the prompt's. table: its blocks."""

    slot: int
    tokens: list[int]
    num_prompt: int
    extras: SlotExtras | None
    table: list[int]
    num_scheduled: int = 0
    told: list[TokenLogprobs] = field(default_factory=list)
    scored: list[TokenLogprobs] = field(default_factory=list)
    embedding: list[float] | None = None


@dataclass(eq=False)
class Flight:
    batch: Batch
    pending: Pending
    rows: list[Sequence]


class Driver:
    """A runner whose batches are made by hand: `launch` decodes and chunks, `land` what came of them, in order."""

    def __init__(self, folder: Path, device: str = "cpu", **options: Any) -> None:
        options = {"block_size": BLOCK, "num_kv_blocks": 256, "max_num_seqs": 8, "dtype": "float32", **options}
        self.config = EngineConfig(device=device, **options)
        self.runner = ModelRunner(folder, ModelConfig.from_hf(folder), self.config)
        self.free_blocks = list(range(self.runner.kv.num_blocks))
        random.shuffle(self.free_blocks)
        self._next = Batch()

    def open(
        self, slot: int, tokens: list[int], *, num_prompt: int | None = None, temperature: float = 0.0, **wants: Any
    ) -> Sequence:
        """A sequence whose first num_prompt tokens are its prompt (all, for None) is given `slot` in the next batch."""
        num_prompt = len(tokens) if num_prompt is None else num_prompt
        self._next.new_slots.append(SlotParams(slot, temperature, 0, 1.0, 0.0, 1000 + slot))
        extras = None
        if wants:
            extras = SlotExtras(slot=slot, num_prompt_tokens=num_prompt, token_ids=list(tokens), **wants)
            self._next.new_extras.append(extras)
        return Sequence(slot, list(tokens), num_prompt, extras, [])

    def share(self, sequence: Sequence, other: Sequence, num_tokens: int) -> None:
        """`sequence` begins with the first num_tokens of `other`: whole blocks are shared, a partial last is copied."""
        whole = num_tokens // BLOCK
        sequence.table = other.table[:whole]
        sequence.num_scheduled = num_tokens
        if num_tokens % BLOCK:
            sequence.table.append(self.free_blocks.pop())
            self.copy(other.table[whole], sequence.table[whole])
        self._tell(sequence, 0)

    def copy(self, source: int, target: int) -> None:
        """The next batch copies one block to another first."""
        self._next.copy_sources.append(source)
        self._next.copy_targets.append(target)

    def launch(self, decodes: list[Sequence], chunks: list[tuple[Sequence, int]] | None = None) -> Flight:
        """A token each of `decodes`, and the next tokens of each chunk, at most as many as it says."""
        batch, self._next = self._next, Batch()
        rows = []
        for sequence in decodes:
            self._add_row(batch, sequence, 1, [])
            batch.samples.append(len(rows))
            rows.append(sequence)
        for sequence, most in chunks or []:
            start = sequence.num_scheduled
            tokens = sequence.tokens[start : start + most]
            self._add_row(batch, sequence, len(tokens), tokens)
            self._score(batch, sequence, len(rows), start, len(tokens))
            if sequence.num_scheduled == len(sequence.tokens):
                batch.samples.append(len(rows))
            rows.append(sequence)
        return Flight(batch, self.runner.launch(batch), rows)

    def land(self, flight: Flight) -> BatchResult:
        """Hand out what came of a flight; flights land in the order of their launches."""
        result = flight.pending.wait()
        for index, (row, token) in enumerate(zip(flight.batch.samples, result.token_ids, strict=True)):
            sequence = flight.rows[row]
            sequence.tokens.append(token)
            if index in result.logprobs:
                sequence.told.append(result.logprobs[index])
            sequence.embedding = result.embeddings.get(index, sequence.embedding)
        for row, entries in result.prompt_logprobs.items():
            flight.rows[row].scored += entries
        return result

    def step(self, decodes: list[Sequence], chunks: list[tuple[Sequence, int]] | None = None) -> BatchResult:
        """`launch` and `land`, back to back."""
        return self.land(self.launch(decodes, chunks))

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), VOCAB] on the CPU, of a whole pass over `tokens`."""
        return self.runner.prompt_logits(tokens).cpu()

    def check_draws(self, sequence: Sequence) -> None:
        """Each drawn token of a greedy sequence is the likeliest by its edited logits, and its logprob is right."""
        logits = self.logits(sequence.tokens[:-1])
        drawn = sequence.tokens[sequence.num_prompt :]
        for index, token in enumerate(drawn):
            raw, before = logits[sequence.num_prompt + index - 1], sequence.tokens[: sequence.num_prompt + index]
            values = raw.tolist() if sequence.extras is None else edited(raw.tolist(), sequence.extras, before)
            assert values[token] >= max(values) - 1e-3, f"token {index} of slot {sequence.slot}"
        if sequence.extras is not None and sequence.extras.logprobs is not None:
            check_logprobs(sequence.told, drawn, logits[sequence.num_prompt - 1 :], sequence.extras.logprobs)

    def _add_row(self, batch: Batch, sequence: Sequence, length: int, tokens: list[int]) -> None:
        batch.slots.append(sequence.slot)
        batch.starts.append(sequence.num_scheduled)
        batch.lengths.append(length)
        batch.token_counts.append(len(tokens))
        batch.token_ids += tokens
        sequence.num_scheduled += length
        known = len(sequence.table)
        while len(sequence.table) * BLOCK < sequence.num_scheduled:
            sequence.table.append(self.free_blocks.pop())
        self._tell(sequence, known, batch)

    def _tell(self, sequence: Sequence, first: int, batch: Batch | None = None) -> None:
        batch = self._next if batch is None else batch
        for index in range(first, len(sequence.table)):
            batch.block_slots.append(sequence.slot)
            batch.block_indices.append(index)
            batch.block_ids.append(sequence.table[index])

    def _score(self, batch: Batch, sequence: Sequence, row: int, start: int, length: int) -> None:
        count = min(start + length, sequence.num_prompt - 1) - start
        if count > 0 and sequence.extras is not None and sequence.extras.prompt_logprobs is not None:
            batch.scored_rows.append(row)
            batch.scored_counts.append(count)
            batch.scored_targets += sequence.tokens[start + 1 : start + 1 + count]


def check_logprobs(entries: list[TokenLogprobs], tokens: list[int], logits: torch.Tensor, num_top: int) -> None:
    """entries[i] tells of tokens[i], drawn or given after logits[i]."""
    assert [entry.token_id for entry in entries] == tokens
    expected = torch.log_softmax(logits.double(), dim=-1)
    given = expected.gather(1, torch.tensor(tokens).unsqueeze(1))
    logprobs = torch.tensor([entry.logprob for entry in entries]).double()
    torch.testing.assert_close(logprobs, given.squeeze(1), atol=1e-4, rtol=0)
    ranks = torch.tensor([entry.rank for entry in entries])
    assert ((expected > given + 1e-4).sum(1) < ranks).all() and (ranks <= (expected >= given - 1e-4).sum(1)).all()
    assert all(len(dict(entry.top)) == len(entry.top) == num_top for entry in entries)
    if num_top:
        ids, values = torch.tensor([entry.top for entry in entries], dtype=torch.float64).unbind(-1)
        for best in (expected.gather(1, ids.long()), expected.topk(num_top).values):
            torch.testing.assert_close(values, best, atol=1e-4, rtol=0)
