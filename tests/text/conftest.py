"""A hand-made tokenizer folder, so that these tests need neither the bundled model nor anyone's data."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from minivllm.text import Tokenizer

PAIRS = ["th", "he", " t", "in", " the", "the", "er", " a", "an", "an ", "im", "end", "\n\n", "!!", "\u00e9"]
PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL_ADDED = {"<|im_start|>": True, "<|im_end|>": True, "<think>": False}


def small_ranks() -> dict[bytes, int]:
    """The 256 bytes, then some merges; a token whose halves are missing gets them first."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for text in PAIRS:
        token = text.encode()
        for length in range(2, len(token) + 1):
            ranks.setdefault(token[:length], len(ranks))
    return ranks


def write_small_folder(folder: Path, **config: Any) -> Path:
    """Write a folder of the rank-file kind; `config` replaces entries of tokenizer_config.json (None removes one)."""
    folder.mkdir(exist_ok=True)
    ranks = small_ranks()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "tokenizer.tiktoken").write_text("".join(lines), encoding="utf-8")
    added = {
        str(len(ranks) + index): {"content": text, "special": special}
        for index, (text, special) in enumerate(SMALL_ADDED.items())
    }
    entries = {
        "tokenizer_class": "TiktokenTokenizer",
        "pattern": PATTERN,
        "added_tokens_decoder": added,
        "chat_template": TEMPLATE,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    } | config
    text = json.dumps({key: value for key, value in entries.items() if value is not None})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    return write_small_folder(tmp_path / "model")


@pytest.fixture
def small(small_folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(small_folder)


@pytest.fixture(scope="session")
def qwen_folder(data_dir: Path) -> Path:
    return data_dir / "tokenizers" / "qwen3"


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(qwen_folder)


@pytest.fixture(scope="session")
def golden_lines(qwen_folder: Path) -> list[str]:
    with gzip.open(qwen_folder / "golden_vectors.jsonl.gz", "rt", encoding="utf-8", newline="\n") as file:
        return file.read().split("\n")


@pytest.fixture(scope="session")
def golden(golden_lines: list[str]) -> list[dict[str, Any]]:
    """Rows {src, text, ids, nfc_changes}. Some lines of the file are fragments of rows (it was cut at U+2028 and its
    like once, and lines were lost); a whole row is a line that starts and ends as an object does."""
    return [json.loads(line) for line in golden_lines if line.startswith('{"src"') and line.endswith("}")]


@pytest.fixture(scope="session")
def golden_tails(golden_lines: list[str]) -> list[tuple[str, list[int]]]:
    """(end of the text, all ids) of the rows of which the file has only the end, where NFC changes nothing."""
    tails = []
    for line in golden_lines:
        if not line.startswith('{"src"') and line.endswith('"nfc_changes": false}'):
            text, _, rest = line.rpartition('", "ids": ')
            tails.append((json.loads(f'"{text}"'), json.loads(rest.partition("]")[0] + "]")))
    return tails
