"""From a folder or archive of books to token ids: cleaning, the byte-level BPE, and packed dialogues.

Prose becomes two long streams (stories and novels) from which windows are cut at random offsets; dialogues are packed
into windows with a mask that marks the assistant's words, the only ones that the loss counts.
"""

from __future__ import annotations

import base64
import random
import re
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tiny_tasks import Message, train_dialogue
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tiny_model.talk import talk_dialogue

VOCAB_SIZE = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
NUM_RANKS = VOCAB_SIZE - len(SPECIAL_TOKENS)
PATTERN = r"'(?:[sdmt]|ll|ve|re)(?!\p{L})| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+(?!\S)|[^\S\n]+"
HELD_OUT_TAIL = 0.015
STORY_BOOKS = (
    "fairytaleqa", "bryant", "burgess", "carroll", "edgeworth", "Burnett", "Ward_Milly", "Stevenson_Treasure",
    "Kipling_Captains",
)  # fmt: skip
LEFT_OUT = ("whitman", "milton", "blake", "shakespeare", "LICENSE")
ASCII_MARKS = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2014": "--", "\x0c": "\n"})


@dataclass(frozen=True)
class Book:
    """One cleaned book: documents to train on, and a contiguous end that is never trained on."""

    name: str
    is_story: bool
    documents: list[str]
    held_out: str


def read_corpus(path: Path) -> dict[str, str]:
    """Name -> raw text of each .txt file in a folder or tar archive, sorted by name."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_text("utf-8", "ignore") for p in sorted(path.rglob("*.txt"))}
    with tarfile.open(path) as archive:
        members = sorted((m for m in archive if m.isfile() and m.name.endswith(".txt")), key=lambda m: m.name)
        return {m.name: archive.extractfile(m).read().decode("utf-8", "ignore") for m in members}  # type: ignore[union-attr]


def _unwrap(block: list[str]) -> list[str]:
    """Paragraphs of one block of lines: a sentence's end ends one if the line is short or a speaker follows."""
    widest = max(map(len, block))
    paragraphs: list[str] = []
    for previous, line in zip(["", *block], block, strict=False):
        ended = re.search(r"""[.!?:]["')]*$""", previous)
        if paragraphs and not (ended and (line[0] in "\"'" or widest > 100 or len(previous) < 0.8 * widest)):
            paragraphs[-1] = f"{paragraphs[-1]} {line}"
        else:
            paragraphs.append(line)
    return paragraphs


def _is_prose(paragraph: str) -> bool:
    letters = [c for c in paragraph if c.isalpha()]
    if len(letters) < 2 or (sum(c.isupper() for c in letters) > 0.4 * len(letters) and len(letters) > 3):
        return False
    if re.match(r"\[|(chapter|volume|book|part)\s+[ivxlc\d]+\b", paragraph, re.IGNORECASE):
        return False
    return bool(re.search(r"""[.!?:;,\-]["')]*$""", paragraph)) and sum(ord(c) > 0x2FF for c in paragraph) < 3


def _is_verse(lines: list[str]) -> bool:
    return sum(line.startswith("   ") for line in lines) * 2 > len(lines)


def clean(raw: str) -> str:
    """Prose of one document: paragraphs on one line each with an empty line between, ASCII quotes, no headings."""
    blocks = re.split(r"\n\s*\n", raw.translate(ASCII_MARKS).replace("\r", ""))
    paragraphs: list[str] = []
    for block in blocks:
        lines = [line for line in block.split("\n") if line.strip()]
        if lines and not _is_verse(lines):
            paragraphs += _unwrap([line.strip() for line in lines])
    cleaned = (re.sub(r"\s+", " ", p.replace("_", "").replace("\x1a", "")).strip() for p in paragraphs)
    return "\n\n".join(p for p in cleaned if p and _is_prose(p))


def load_books(path: Path) -> list[Book]:
    """Clean every book that is used; the last 1.5 % of each (all of a file named `val`) is held out."""
    books = []
    for name, raw in read_corpus(path).items():
        if any(word in name for word in LEFT_OUT):
            continue
        documents = [text for part in raw.split("<|endoftext|>") if len(text := clean(part)) > 200]
        is_story = any(word in name for word in STORY_BOOKS)
        if "_val" in name:
            books.append(Book(name, is_story, [], "<|endoftext|>".join(documents)))
            continue
        cut = documents[-1].rfind("\n\n", 0, int(len(documents[-1]) - HELD_OUT_TAIL * sum(map(len, documents))))
        documents[-1], tail = documents[-1][: max(cut, 0)], documents[-1][max(cut, 0) :].strip()
        books.append(Book(name, is_story, [d for d in documents if d], tail))
    return books


def train_ranks(texts: Iterable[str]) -> tuple[dict[bytes, int], Tokenizer]:
    """Byte-level BPE: byte string -> rank, in merge order; and the `tokenizers` object that it was learned with."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=NUM_RANKS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    printable = _byte_of_character()
    ranks = {bytes(printable[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}
    assert sorted(ranks.values()) == list(range(NUM_RANKS)), "ranks must be contiguous"
    return ranks, tokenizer


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others follow from U+0100 on."""
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in themselves]
    return {chr(b): b for b in themselves} | {chr(256 + i): b for i, b in enumerate(others)}


def make_encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """The tokenizer that training and minivllm use."""
    specials = {token: NUM_RANKS + i for i, token in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding(
        "tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials, explicit_n_vocab=VOCAB_SIZE
    )


def save_ranks(ranks: dict[bytes, int], path: Path) -> None:
    """Write tiktoken's format: `base64(token) rank` a line, in rank order."""
    lines = (
        f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=lambda i: i[1])
    )
    path.write_text("".join(lines), "ascii")


def load_ranks(path: Path) -> dict[bytes, int]:
    """Read what `save_ranks` wrote."""
    pairs = (line.split() for line in path.read_text("ascii").splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def encode_documents(encoding: tiktoken.Encoding, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """One stream of token ids with <|endoftext|> before each document, and the documents' first positions."""
    end_of_text = NUM_RANKS
    encoded = encoding.encode_ordinary_batch(list(documents), num_threads=8)
    starts = np.cumsum([0] + [len(ids) + 1 for ids in encoded])[:-1]
    return np.concatenate([np.array([end_of_text, *ids], np.uint16) for ids in encoded]), starts


def encode_dialogue(encoding: tiktoken.Encoding, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids as the chat template renders them, and a 0/1 mask of the tokens that the assistant writes."""
    role_ids = {"system": NUM_RANKS + 1, "user": NUM_RANKS + 2, "assistant": NUM_RANKS + 3}
    ids: list[int] = []
    mask: list[int] = []
    for message in messages:
        body = [*encoding.encode_ordinary(message["content"]), NUM_RANKS + 4]
        ids += [role_ids[message["role"]], *body]
        mask += [0] + [int(message["role"] == "assistant")] * len(body)
    return ids, mask


def story_passages(documents: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Openings of stories, and (beginning, continuation) pairs, cut where a sentence ends."""
    openings, passages = [], []
    for document in documents:
        paragraphs = document.split("\n\n")
        openings.append(_until_sentence(" ".join(paragraphs[:12]), 900))
        for at in range(0, len(paragraphs) - 6, 6):
            text = " ".join(paragraphs[at : at + 6])
            begin = _until_sentence(text, 200)
            rest = _until_sentence(text[len(begin) :].strip(), 700)
            if begin and len(rest) > 100:
                passages.append((begin, rest))
    return [o for o in openings if len(o) > 200], passages


def _until_sentence(text: str, limit: int) -> str:
    ends = [m.end() for m in re.finditer(r"""[.!?]["']?(?= |$)""", text[: limit + 1]) if m.end() <= limit]
    return text[: ends[-1]] if ends else ""


@dataclass(frozen=True)
class PackJob:
    """What one worker process needs to make its share of the dialogue windows."""

    seed: str
    windows: int
    length: int
    talk_share: float
    story_share: float
    ranks: dict[bytes, int]
    openings: list[str]
    passages: list[tuple[str, str]]


def pack_windows(job: PackJob) -> tuple[np.ndarray, np.ndarray]:
    """Windows of whole dialogues, each closed by <|endoftext|>: ids uint16 and mask uint8, both [windows, length]."""
    encoding, rng = make_encoding(job.ranks), random.Random(job.seed)
    ids = np.full((job.windows, job.length), NUM_RANKS + 5, np.uint16)
    mask = np.zeros((job.windows, job.length), np.uint8)
    row = used = 0
    while row < job.windows:
        if rng.random() < job.talk_share:
            messages = talk_dialogue(rng, job.openings, job.passages, job.story_share)
        else:
            messages = train_dialogue(rng)
        new_ids, new_mask = encode_dialogue(encoding, messages)
        if used and used + len(new_ids) + 1 > job.length:
            row, used = row + 1, 0
        if row == job.windows or len(new_ids) >= job.length:
            continue
        ids[row, used : used + len(new_ids) + 1] = [*new_ids, NUM_RANKS]
        mask[row, used : used + len(new_ids)] = new_mask
        used += len(new_ids) + 1
    return ids, mask


def pack_in_parallel(job: PackJob, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """`job.windows` windows made by `workers` processes; the result depends on the seed and the worker count."""
    share = -(-job.windows // workers)
    jobs = [PackJob(f"{job.seed}|{i}", share, *list(vars(job).values())[2:]) for i in range(workers)]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(pack_windows, jobs))
    return np.concatenate([p[0] for p in parts])[: job.windows], np.concatenate([p[1] for p in parts])[: job.windows]
