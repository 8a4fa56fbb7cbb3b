"""Ids equal to those of two independent libraries, added tokens, decoding, and inputs meant to hurt."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import minivllm
from minivllm.errors import RequestError
from minivllm.text import Tokenizer
from minivllm.text.loaders import load_spec
from minivllm.text.tokenizer import MAX_WHITE_SPACE_RUN

from .conftest import SMALL_ADDED, small_ranks, write_small_folder

LETTERS = "aA zé\u0301\u0338\u0323<>|中한글ㅎ\u1112\u1161🙂1٣ \t\n\r'sS_.!\u2028\u00a0\u3000"


def random_text(rng: random.Random, spellings: list[str], length: int) -> str:
    return "".join(rng.choice(spellings) if rng.random() < 0.1 else rng.choice(LETTERS) for _ in range(length))


def test_qwen_equals_every_golden_vector(qwen: Tokenizer, golden: list[dict[str, Any]]) -> None:
    assert len(golden) >= 640 and sum(row["nfc_changes"] for row in golden) >= 60
    wrong = [row["text"] for row in golden if qwen.encode(row["text"]) != row["ids"]]
    assert wrong == []


def test_qwen_equals_the_golden_ids_whose_text_was_cut(
    qwen: Tokenizer, golden_tails: list[tuple[str, list[int]]]
) -> None:
    assert len(golden_tails) >= 50
    for tail, ids in golden_tails:
        text = qwen.decode(ids)
        assert text.endswith(tail)
        assert qwen.encode(text) == ids


def test_qwen_equals_transformers_with_added_tokens(qwen: Tokenizer, qwen_folder: Path, seed: int) -> None:
    reference = AutoTokenizer.from_pretrained(qwen_folder)
    spellings = [*load_spec(qwen_folder).added_tokens, "<|im_", "end|>", "<<think>"]
    rng = random.Random(seed)
    for _ in range(300):
        text = random_text(rng, spellings, rng.randrange(1, 60))
        ids = qwen.encode(text, allow_special=True)
        assert ids == reference.encode(text), text
        for skip in (True, False):
            assert qwen.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip), text


def test_qwen_merges_and_ids_describe_one_bpe(qwen_folder: Path) -> None:
    """tiktoken merges by id alone: with lower ids only, each token must come to the two parts that merges.txt joins."""
    ranks = load_spec(qwen_folder).pairs.ranks
    by_id = {rank: token for token, rank in ranks.items()}
    alphabet = {chr(code): byte for code, byte in _printable_bytes()}
    lines = (qwen_folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(filter(None, lines)):
        expected = [bytes(alphabet[char] for char in part) for part in line.split(" ")]
        assert _merged_below(by_id[256 + number], ranks) == expected, line


def _printable_bytes() -> list[tuple[int, int]]:
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20 and byte != 0xAD]
    others = [byte for byte in range(256) if byte not in printable]
    return [*zip(printable, printable, strict=True), *((256 + index, byte) for index, byte in enumerate(others))]


def _merged_below(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    parts = [token[index : index + 1] for index in range(len(token))]
    while True:
        pairs = [(ranks.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1)]
        rank, at = min(pairs)
        if rank >= ranks[token]:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_qwen_properties(qwen: Tokenizer, qwen_folder: Path) -> None:
    assert qwen.vocab_size == 151936 and qwen.bos_token_id is None and qwen.eos_token_id == 151645
    assert qwen.special_ids == frozenset(range(151643, 151657))
    assert qwen.name_or_path == str(qwen_folder)
    assert qwen.chat_template is not None and "enable_thinking" in qwen.chat_template
    assert qwen.encode("a", add_special_tokens=True) == qwen.encode("a")


def test_ids_without_text_decode_to_nothing(qwen: Tokenizer) -> None:
    assert qwen.decode([*range(151669, 151936)]) == "" and qwen.token_bytes(151800) == b""
    assert qwen.decode([151669, *qwen.encode("ab"), 151935]) == "ab"
    with pytest.raises(RequestError, match="151936"):
        qwen.decode([0, 151936])


def test_small_ids_by_hand(small: Tokenizer) -> None:
    ranks = small_ranks()
    # " the" is made by " t", "he"; "the" alone by "th" first.
    assert small.encode("the the!!") == [ranks[b"the"], ranks[b" the"], ranks[b"!!"]]
    assert small.encode("1 \u00e9\x00") == [ord("1"), ord(" "), ranks[b"\xc3\xa9"], 0]
    assert small.encode("") == [] and small.decode([]) == ""


def test_special_tokens_only_on_request(small: Tokenizer) -> None:
    start, end, think = (small.encode(text, allow_special=True) for text in SMALL_ADDED)
    first = len(small_ranks())
    assert (start, end, think) == ([first], [first + 1], [first + 2])
    assert small.special_ids == {first, first + 1}
    text = "a<|im_end|>\u0338b<think><|im_end"
    plain, spelled = small.encode(text), small.encode(text, allow_special=True)
    assert max(plain) < first and small.decode(plain) == text
    assert spelled == [*b"a", *end, *small.encode("\u0338b"), *think, *small.encode("<|im_end")]
    assert small.decode(spelled) == "a\u0338b<think><|im_end"
    assert small.decode(spelled, skip_special_tokens=False) == text


def test_bos_is_added_where_the_model_wants_it(tmp_path: Path) -> None:
    with_bos = Tokenizer.from_pretrained(write_small_folder(tmp_path / "a", add_bos_token=True))
    without = Tokenizer.from_pretrained(write_small_folder(tmp_path / "b"))
    assert with_bos.encode("an", add_special_tokens=True) == [with_bos.bos_token_id, *without.encode("an")]
    assert with_bos.encode("an") == without.encode("an", add_special_tokens=True) == without.encode("an")


def test_bytes_and_broken_utf8(small: Tokenizer, seed: int) -> None:
    data = random.Random(seed).randbytes(300)
    assert small.decode(list(data)) == data.decode("utf-8", "replace")
    assert b"".join(map(small.token_bytes, data)) == small.decode_bytes(list(data)) == data


def test_round_trip(qwen: Tokenizer, small: Tokenizer, golden: list[dict[str, Any]], seed: int) -> None:
    rng = random.Random(seed)
    texts = [row["text"] for row in golden] + [random_text(rng, ["<|im_end|>"], 50) for _ in range(100)]
    assert [small.decode(small.encode(text)) for text in texts] == texts
    assert [qwen.decode(row["ids"]) for row in golden if not row["nfc_changes"]] == [
        row["text"] for row in golden if not row["nfc_changes"]
    ]


@pytest.mark.parametrize("token", [-1, 1 << 40, 1.0, "1", None])
def test_wrong_ids_are_named(small: Tokenizer, token: Any) -> None:
    for call in (lambda: small.decode([1, token]), lambda: small.token_bytes(token)):
        with pytest.raises(RequestError, match=f"token id {token!r} is not an integer in 0.."):
            call()


def test_wrong_texts(small: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"U\+D83D at position 2"):
        small.encode("ab\ud83d")
    with pytest.raises(RequestError, match="text is bytes"):
        small.encode(b"ab")  # type: ignore[arg-type]


LONG = 400_000
ENDLESS = {
    "one letter": "a" * LONG,
    "random letters": "qzjxk" * (LONG // 5),
    "white space": " " * LONG + "x",
    "tabs": "\t " * (LONG // 2),
    "wide spaces": "\u3000" * LONG,
    "line ends": "\n" * LONG,
    "digits": "1" * LONG,
    "punctuation": "!" * LONG,
    "falling marks": "a" + "\u0345" * (LONG // 2) + "\u0334" * (LONG // 2),
    "hidden marks": "\u0f73" * LONG,
    "openings": "<|im_" * (LONG // 5),
    "emoji": "\U0001f600" * LONG,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_repetition_takes_linear_time(qwen: Tokenizer, name: str) -> None:
    text = ENDLESS[name]
    start = time.perf_counter()
    ids = qwen.encode(text, allow_special=True)
    assert time.perf_counter() - start < 5.0  # about 0.2 s; quadratic time would be minutes
    if "marks" not in name:
        assert qwen.decode(ids) == text


def test_white_space_beyond_the_regex_engine_is_refused(qwen: Tokenizer, small: Tokenizer) -> None:
    for tokenizer in (qwen, small):
        with pytest.raises(RequestError, match=f"at position 1; at most {MAX_WHITE_SPACE_RUN} are allowed"):
            tokenizer.encode("a" + " " * (MAX_WHITE_SPACE_RUN + 1))
        assert tokenizer.decode(tokenizer.encode((" " * 300_000 + "x") * 2)) == (" " * 300_000 + "x") * 2


def test_a_pattern_that_gives_up_is_a_request_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pattern = r"(?:a|b)+(?!\S)|[\s\S]"  # one state a letter, so 1,000,000 letters end the regex engine
    tokenizer = Tokenizer.from_pretrained(write_small_folder(tmp_path / "m", pattern=pattern))
    with pytest.raises(RequestError, match="too much for the tokenizer's pattern"):
        tokenizer.encode("ab" * 1_000_000)
    assert tokenizer.encode("ab") == [ord("a"), ord("b")]


def test_bundled_model() -> None:
    tokenizer = Tokenizer.from_pretrained(Path(minivllm.__path__[0]) / "assets" / "tiny")
    assert tokenizer.vocab_size == 4096 and tokenizer.eos_token_id is not None
    text = "Once upon a time there was a caf\u00e9, \u4e2d\u6587 \U0001f600!\n\n  The end. <|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not tokenizer.special_ids & set(ids)
    assert len(tokenizer.encode("Once upon a time there was a king.")) < 16
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Tell me a story."}])
    assert "Tell me a story." in tokenizer.decode(chat)
