"""Every way in which a tokenizer folder can be wrong is told by file and finding."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minivllm.errors import TokenizerError
from minivllm.text import Tokenizer

from .conftest import TEMPLATE, small_ranks, write_small_folder


def line(token: bytes, rank: object) -> str:
    return f"{base64.b64encode(token).decode()} {rank}\n"


def append(name: str, text: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(text)

    return change


def replace(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def config(**entries: Any) -> Callable[[Path], object]:
    return lambda folder: write_small_folder(folder, **entries)


NEXT = len(small_ranks()) + 50
RANKS, CONFIG = "tokenizer.tiktoken", "tokenizer_config.json"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), rf"{CONFIG}: cannot be read \(No such file"),
    "no ranks": (lambda folder: (folder / RANKS).unlink(), rf"{RANKS}: cannot be read \(No such file"),
    "config not JSON": (replace(CONFIG, b"{'a': 1}"), f"{CONFIG}: not JSON"),
    "config nested without end": (replace(CONFIG, b"[" * 200_000), f"{CONFIG}: not JSON"),
    "config not an object": (replace(CONFIG, b"[1]"), f"{CONFIG}: holds a JSON list"),
    "config not UTF-8": (replace(CONFIG, b'{"a": "\xff"}'), f"{CONFIG}: byte 7 is not UTF-8"),
    "unknown class": (config(tokenizer_class="Llama"), "tokenizer_class is 'Llama'; supported are TiktokenTokenizer"),
    "class is a list": (config(tokenizer_class=["a"]), r"tokenizer_class is \['a'\]"),
    "unsupported option": (config(add_prefix_space=True), "add_prefix_space is True"),
    "no pattern": (config(pattern=None), "pattern is None; expected a regular expression"),
    "bad pattern": (config(pattern="(a"), r"the pattern '\(a' is not a regular expression"),
    "pattern skips": (config(pattern="[a-z]+"), "skips characters"),
    "three fields": (append(RANKS, "YWE= 500 7\n"), r"line 27\d: b'YWE= 500 7' is not 'base64 rank'"),
    "no rank": (append(RANKS, "YWE=\n"), "is not 'base64 rank'"),
    "not base64": (append(RANKS, f"Y*E= {NEXT}\n"), "is not 'base64 rank'"),
    "rank not a number": (append(RANKS, line(b"aa", "x")), "is not 'base64 rank'"),
    "negative rank": (append(RANKS, line(b"aa", -4)), "is not 'base64 rank'"),
    "huge rank": (append(RANKS, line(b"aa", 1 << 40)), "is not 'base64 rank'"),
    "duplicate rank": (append(RANKS, line(b"aa", 65)), "rank 65 or its token b'aa' stands in line 66 too"),
    "duplicate token": (append(RANKS, line(b"A", NEXT)), "its token b'A' stands in line 66 too"),
    "not a BPE": (append(RANKS, line(b"xyz", NEXT)), r"token b'xyz' \(rank \d+\) is not two tokens of lower rank"),
    "byte missing": (replace(RANKS, line(b"a", 0).encode()), "no token for byte 0x00"),
    "empty ranks": (replace(RANKS, b""), "no token for byte 0x00"),
    "added not an object": (config(added_tokens_decoder=[1]), "added_tokens_decoder is list"),
    "added id": (config(added_tokens_decoder={"x": {"content": "<a>"}}), r"added_tokens_decoder\['x'\]"),
    "added content": (config(added_tokens_decoder={"900": {"content": 5}}), r"added_tokens_decoder\['900'\]"),
    "added strips": (config(added_tokens_decoder={"900": {"content": "<a>", "lstrip": True}}), "not supported"),
    "added taken": (config(added_tokens_decoder={"65": {"content": "<a>"}}), "has id 65, which is token b'A'"),
    "added twice": (
        config(added_tokens_decoder={"900": {"content": "<a>"}, "901": {"content": "<a>"}}),
        "'<a>' has two ids, 900 and 901",
    ),
    "eos not a string": (config(eos_token=5), "eos_token is 5"),
    "eos unknown": (config(eos_token="<nope>"), "eos_token '<nope>' is not a token"),
    "bos wanted, not given": (config(add_bos_token=True, bos_token=None), "there is no bos_token"),
    "template type": (config(chat_template=5), "chat_template is int"),
    "vocab_size": (replace("config.json", b'{"vocab_size": -1}'), "config.json: vocab_size is -1"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folder(small_folder: Path, name: str) -> None:
    change, message = BAD_FOLDERS[name]
    change(small_folder)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_pretrained(small_folder)


def test_missing_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", "Qwen/Qwen3-4B"):
        with pytest.raises(TokenizerError, match=f"no model folder at '{path}'"):
            Tokenizer.from_pretrained(path)


def write_qwen_kind(folder: Path, merges: list[str], extra: dict[str, int] | None = None) -> Path:
    """A Qwen2 folder with the 256 bytes in GPT-2's alphabet and the given merges."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    vocab = {token: index for index, token in enumerate(alphabet)}
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    vocab |= extra or {}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}), encoding="utf-8")
    return folder


def test_qwen_kind_by_hand(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(write_qwen_kind(tmp_path, ["t h", "th e", "\u0120 the"]))
    assert tokenizer.encode("the the") == [257, 258] and tokenizer.vocab_size == 259
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert tokenizer.eos_token_id is None and tokenizer.special_ids == frozenset()
    assert tokenizer.chat_template is None and tokenizer.encode("<a>", allow_special=True) == tokenizer.encode("<a>")


QWEN_MERGES: dict[str, tuple[list[str], dict[str, int], str]] = {
    "part unknown": (["t h", "qq e"], {}, r"merges.txt, line 3: 'qq e' is not a merge"),
    "no space": (["t h", "the"], {}, r"line 3: 'the' is not a merge"),
    "result unknown": (["t h"], {"th": 256, "unused": 400}, "no merge makes token 'unused'"),
    "order": (["t h", "h e"], {"th": 257, "he": 256}, r"line 3: 'h e' has id 256 after 257; ids must follow"),
    "part made later": (["th e", "t h"], {}, "'th e' is not a merge|'th e' has id"),
    "twice": (["t h", "t h"], {}, r"line 3: 't h' has id 256 after 256"),
    "shared id": (["t h"], {"th": 5}, "two tokens share one id"),
    "id not a number": (["t h"], {"th": 1.5}, "id of 'th' is 1.5"),  # type: ignore[dict-item]
    "alphabet": (["t h"], {"\u4e2d": 300}, "outside GPT-2's byte alphabet"),
    "alphabet within Latin-1": (["t h"], {"\u00a0": 300}, "outside GPT-2's byte alphabet"),
}


@pytest.mark.parametrize("name", QWEN_MERGES)
def test_merges_that_are_not_a_bpe_by_id(tmp_path: Path, name: str) -> None:
    merges, extra, message = QWEN_MERGES[name]
    write_qwen_kind(tmp_path, merges, extra)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_byte_missing_in_vocab(tmp_path: Path) -> None:
    write_qwen_kind(tmp_path, [])
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    del vocab["A"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(TokenizerError, match="no token for byte 0x41"):
        Tokenizer.from_pretrained(tmp_path)


def test_where_the_chat_template_comes_from(tmp_path: Path) -> None:
    listed = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    folder = write_small_folder(tmp_path / "model", chat_template=listed)
    assert Tokenizer.from_pretrained(folder).chat_template == TEMPLATE
    (folder / "chat_template.jinja").write_text("own file", encoding="utf-8")
    assert Tokenizer.from_pretrained(folder).chat_template == "own file"
    bare = write_small_folder(tmp_path / "bare", chat_template=[{"name": "rag", "template": "no"}])
    assert Tokenizer.from_pretrained(bare).chat_template is None


def test_named_token_as_object(tmp_path: Path) -> None:
    folder = write_small_folder(tmp_path / "model", eos_token={"content": "<|im_end|>", "lstrip": False})
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.decode([tokenizer.eos_token_id or 0], skip_special_tokens=False) == "<|im_end|>"
