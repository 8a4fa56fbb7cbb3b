"""What a training step of the tiny model sees: the prepared data, and the batch of each step.

A batch is drawn from the seed and the step number alone, so a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tiny_tasks import train_dialogue
from torch import Tensor

from tiny_model.data import (
    Book,
    PackJob,
    encode_documents,
    load_books,
    load_ranks,
    make_encoding,
    pack_in_parallel,
    save_ranks,
    story_passages,
    train_ranks,
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, besides the corpus."""

    seed: int
    steps: int
    minutes: float
    batch: int
    length: int
    lr: float
    adam_lr: float
    weight_decay: float
    dropout: float
    warmup: float
    decay: float
    prose_share: float
    story_share: float
    final_story_share: float
    task_weight: float
    dialogue_windows: int
    talk_share: float
    talk_story_share: float


@dataclass(frozen=True)
class Data:
    """What training draws from; `prose` holds the stories first, then the novels."""

    ranks: dict[bytes, int]
    prose: Tensor
    num_story_tokens: int
    story_starts: Tensor
    windows: Tensor
    mask: Tensor
    held_out: dict[str, list[str]]
    facts: dict[str, Any]


def prepare(corpus: Path, work: Path, settings: Settings, workers: int, device: torch.device) -> Data:
    """Clean the books, learn the tokenizer, encode the prose and make the dialogues."""
    started = time.perf_counter()
    books = load_books(corpus)
    documents = {story: [d for b in books if b.is_story == story for d in b.documents] for story in (True, False)}
    if not documents[True] or not documents[False] or not any("fairytale" in b.name for b in books):
        raise click.UsageError(f"{corpus} has {len(books)} books; it needs stories, novels and a file of fairy tales")
    ranks = _ranks(work / "tokenizer.tiktoken", documents, settings.seed)
    encoding = make_encoding(ranks)
    stories, starts = encode_documents(encoding, documents[True])
    novels, _ = encode_documents(encoding, documents[False])
    openings, _ = story_passages([d for b in books if "fairytale" in b.name for d in b.documents])
    _, passages = story_passages(documents[True] + documents[False])
    job = PackJob(
        str(settings.seed), settings.dialogue_windows, settings.length + 1, settings.talk_share,
        settings.talk_story_share, ranks, openings, passages,
    )  # fmt: skip
    windows, mask = pack_in_parallel(job, workers)
    click.echo(
        f"data: {len(stories):,} story tokens, {len(novels):,} novel tokens, {windows.size:,} dialogue tokens "
        f"({mask.mean():.0%} answers), {len(passages):,} passages, {time.perf_counter() - started:.0f} s"
    )
    return Data(
        ranks,
        torch.from_numpy(np.concatenate([stories, novels]).astype(np.int16)).to(device),
        len(stories),
        torch.from_numpy(starts),
        torch.from_numpy(windows.astype(np.int16)).to(device),
        torch.from_numpy(mask).to(device),
        _held_out(books),
        _corpus_facts(books, documents),
    )


def _ranks(path: Path, documents: dict[bool, list[str]], seed: int) -> dict[bytes, int]:
    if path.exists():
        return load_ranks(path)
    rng = random.Random(seed)
    dialogues = (m["content"] for _ in range(20000) for m in train_dialogue(rng))
    ranks, _ = train_ranks([*documents[True] * 2, *documents[False], *dialogues])
    save_ranks(ranks, path)
    return ranks


def _held_out(books: list[Book]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"unseen fairy tales": [], "ends of simple prose": [], "ends of novels": []}
    for book in books:
        name = (
            "unseen fairy tales"
            if not book.documents
            else "ends of simple prose"
            if book.is_story
            else "ends of novels"
        )
        groups[name] += book.held_out.split("<|endoftext|>")
    return {name: texts for name, texts in groups.items() if any(texts)}


def _corpus_facts(books: list[Book], documents: dict[bool, list[str]]) -> dict[str, Any]:
    return {
        "books": sum("fairytale" not in book.name for book in books),
        "story_bytes": sum(len(d.encode()) for d in documents[True]) / 1e6,
        "novel_bytes": sum(len(d.encode()) for d in documents[False]) / 1e6,
    }


class Sampler:
    """Draws the batch of a step from the seed and the step number alone."""

    def __init__(self, data: Data, settings: Settings) -> None:
        self.data, self.settings = data, settings
        self.prose_rows = round(settings.batch * settings.prose_share)

    def draw(self, step: int, progress: float) -> tuple[Tensor, Tensor]:
        """Ids [batch, length + 1]; loss weights [batch, length] that sum to 1 in prose, to task_weight in dialogues."""
        s, data = self.settings, self.data
        generator = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
        story_share = s.final_story_share if progress > 1 - s.decay else s.story_share
        starts = self._prose_starts(generator, story_share)[:, None] + torch.arange(s.length + 1)
        rows = torch.randint(len(data.windows), (s.batch - self.prose_rows,), generator=generator)
        device = data.prose.device
        prose = data.prose[starts.to(device, non_blocking=True)]
        rows = rows.to(device, non_blocking=True)
        weights = torch.full((s.batch, s.length), 1 / (self.prose_rows * s.length), device=device)
        answers = data.mask[rows][:, 1:].float()
        weights[self.prose_rows :] = answers * (s.task_weight / answers.sum().clamp(min=1))
        return torch.cat((prose, data.windows[rows])).long(), weights

    def _prose_starts(self, generator: torch.Generator, story_share: float) -> Tensor:
        """Random offsets; one story window in sixteen begins where a story does, with or without <|endoftext|>."""
        data, count, span = self.data, self.prose_rows, self.settings.length + 1
        u = torch.rand(count, 3, generator=generator, dtype=torch.float64)
        story = (u[:, 1] * max(1, data.num_story_tokens - span)).long()
        begin = data.story_starts[(u[:, 1] * len(data.story_starts)).long()] + (u[:, 2] * 32).long() % 2
        story = torch.where(u[:, 2] < 1 / 16, begin.clamp(max=len(data.prose) - span), story)
        novels = len(data.prose) - data.num_story_tokens
        novel = data.num_story_tokens + (u[:, 1] * max(1, novels - span)).long()
        return torch.where(u[:, 0] < story_share, story, novel)
