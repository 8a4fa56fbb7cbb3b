"""Reads the tokenizer of a model folder into one plain value, `TokenizerSpec`.

Each kind of folder has one function that yields byte-level BPE ranks and the pattern that splits text; the table
`LOADERS` picks it by the `tokenizer_class` of tokenizer_config.json. All checks of the files are made here, once:
nothing in the folder is executed, and nothing is fetched from anywhere.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivllm.errors import TokenizerError

MAX_VOCAB = 1 << 22
"""Token ids stay below this; the largest vocabularies in use have about 2**18 entries."""

QWEN2_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English endings
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word with at most one other character (mostly a space) before it
        r"\p{N}",  # digits one by one
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation with the line ends behind it
        r"\s*[\r\n]+",  # white space up to its last line end
        r"\s+(?!\S)",  # white space, except the last one before a word
        r"\s+",
    ]
)
"""How Qwen2, Qwen2.5 and Qwen3 cut text before byte-pair merges (stated in the tokenizer files of these models)."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MUST_BE_OFF = ("add_prefix_space", "add_eos_token", "clean_up_tokenization_spaces")


@dataclass(frozen=True)
class BytePairs:
    """A byte-level BPE: token bytes -> id, where the lower id is merged first, and the pattern that cuts text."""

    ranks: Mapping[bytes, int]
    pattern: str
    nfc: bool


@dataclass(frozen=True)
class TokenizerSpec:
    """All that a tokenizer folder says, checked.

    Attributes:
        pairs: the byte-level BPE.
        added_tokens: text -> id of the tokens that stand outside the BPE.
        special_tokens: the added tokens that steer the model (end of turn, ...) rather than carry text.
        named_tokens: "bos_token", "eos_token", ... -> text, as chat templates see them; unset names are absent.
        add_bos: whether the model expects the BOS token before a text.
        chat_template: source of the Jinja chat template, or None.
        vocab_size: number of ids that the model can emit; config.json may give more than have text.
    """

    pairs: BytePairs
    added_tokens: Mapping[str, int]
    special_tokens: frozenset[str]
    named_tokens: Mapping[str, str]
    add_bos: bool
    chat_template: str | None
    vocab_size: int


def load_spec(folder: Path) -> TokenizerSpec:
    """Read and check a tokenizer folder.

    Raises:
        TokenizerError: the folder or a file is missing or cannot be used; the text names the file and the fix.
    """
    if not folder.is_dir():
        raise TokenizerError(
            f"no model folder at '{folder}'; minivllm reads local folders only, so give the path of one"
        )
    path = folder / "tokenizer_config.json"
    config = _read_json_object(path)
    kind = config.get("tokenizer_class")
    loader = LOADERS.get(kind) if isinstance(kind, str) else None
    if loader is None:
        raise TokenizerError(f"{path}: tokenizer_class is {kind!r}; supported are {', '.join(LOADERS)}")
    for option in _MUST_BE_OFF:
        if config.get(option):
            raise TokenizerError(f"{path}: {option} is {config[option]!r}, which is not supported; only false is")
    added, special = _added_tokens(config, path)
    pairs = loader(folder, config, added)
    _check_added_ids(added, pairs.ranks, path)
    named = _named_tokens(config, path)
    if config.get("add_bos_token") and "bos_token" not in named:
        raise TokenizerError(f"{path}: add_bos_token is true, but there is no bos_token; set one or make it false")
    highest = max(max(pairs.ranks.values()), max(added.values(), default=0))
    return TokenizerSpec(
        pairs=pairs,
        added_tokens=added,
        special_tokens=special | {token for token in named.values() if token in added},
        named_tokens=named,
        add_bos=bool(config.get("add_bos_token")),
        chat_template=_chat_template(folder, config),
        vocab_size=max(highest + 1, _model_vocab_size(folder)),
    )


def load_rank_file(folder: Path, config: Mapping[str, Any], added: Mapping[str, int]) -> BytePairs:
    """tokenizer.tiktoken: one `base64-of-bytes rank` a line; the pattern is in tokenizer_config.json."""
    path = folder / "tokenizer.tiktoken"
    ranks: dict[bytes, int] = {}
    seen: dict[int, int] = {}
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        token, rank = _rank_line(line, f"{path}, line {number}")
        if rank in seen or token in ranks:
            first = seen.get(rank, seen.get(ranks.get(token, -1)))
            raise TokenizerError(
                f"{path}, line {number}: rank {rank} or its token {token!r} stands in line {first} too"
            )
        ranks[token] = rank
        seen[rank] = number
    _check_single_bytes(ranks, path)
    _check_splits(ranks, path)
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: pattern is {pattern!r}; expected a regular expression"
        )
    return BytePairs(ranks, pattern, nfc=False)


def load_qwen2(folder: Path, config: Mapping[str, Any], added: Mapping[str, int]) -> BytePairs:
    """vocab.json + merges.txt, written in GPT-2's printable byte alphabet, of Qwen2, Qwen2.5 and Qwen3.

    Merges are done in the order of their ids, so ids must follow the order of merges.txt; that is checked line by line.
    """
    path = folder / "vocab.json"
    vocab = {token: rank for token, rank in _read_json_object(path).items() if token not in added}
    for token, rank in vocab.items():
        if type(rank) is not int or not 0 <= rank < MAX_VOCAB:
            raise TokenizerError(f"{path}: id of {token!r} is {rank!r}; expected an integer in 0..{MAX_VOCAB - 1}")
    if len(set(vocab.values())) != len(vocab):
        raise TokenizerError(f"{path}: two tokens share one id; each token needs its own")
    _check_merges(vocab, folder / "merges.txt")
    alphabet = _printable_alphabet()
    try:
        ranks = {token.translate(alphabet).encode("latin-1"): rank for token, rank in vocab.items()}
    except UnicodeEncodeError as error:
        raise TokenizerError(f"{path}: token {error.object!r} has a character outside GPT-2's byte alphabet") from error
    _check_single_bytes(ranks, path)
    return BytePairs(ranks, QWEN2_PATTERN, nfc=True)


Loader = Callable[[Path, Mapping[str, Any], Mapping[str, int]], BytePairs]

LOADERS: dict[str, Loader] = {
    "TiktokenTokenizer": load_rank_file,
    "Qwen2Tokenizer": load_qwen2,
    "Qwen2TokenizerFast": load_qwen2,
}
"""`tokenizer_class` -> function that reads the BPE of such a folder."""


def _rank_line(line: bytes, where: str) -> tuple[bytes, int]:
    fields = line.split()
    try:
        token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
    except (IndexError, binascii.Error, ValueError):
        token, rank = b"", -1
    if len(fields) != 2 or not token or not 0 <= rank < MAX_VOCAB:
        raise TokenizerError(f"{where}: {line[:80]!r} is not 'base64 rank' with a rank in 0..{MAX_VOCAB - 1}")
    return token, rank


def _check_single_bytes(ranks: Mapping[bytes, int], path: Path) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{path}: no token for byte 0x{missing[0]:02x}; byte-level BPE needs all 256")


def _check_splits(ranks: Mapping[bytes, int], path: Path) -> None:
    """Every longer token must be two tokens that exist before it; else merges could never reach it."""

    def is_earlier(part: bytes, rank: int) -> bool:
        return len(part) == 1 or ranks.get(part, rank) < rank

    for token, rank in ranks.items():
        cuts = range(1, len(token))
        if cuts and not any(is_earlier(token[:cut], rank) and is_earlier(token[cut:], rank) for cut in cuts):
            raise TokenizerError(f"{path}: token {token!r} (rank {rank}) is not two tokens of lower rank: not a BPE")


def _check_merges(vocab: Mapping[str, int], path: Path) -> None:
    """Each merge must join two known tokens into a token whose id is above that of the merge before."""
    made: set[str] = set()
    previous = -1
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        rank = vocab.get(left + right)
        if left not in vocab or right not in vocab or rank is None:
            raise TokenizerError(
                f"{path}, line {number}: {line!r} is not a merge of two tokens of vocab.json into a third"
            )
        if rank <= previous or (len(left) > 1 and left not in made) or (len(right) > 1 and right not in made):
            raise TokenizerError(
                f"{path}, line {number}: {line!r} has id {rank} after {previous}; ids must follow the order of merges"
            )
        made.add(left + right)
        previous = rank
    unreachable = [token for token in vocab if len(token) > 1 and token not in made]
    if unreachable:
        raise TokenizerError(
            f"{path}: no merge makes token {unreachable[0]!r} of vocab.json; the files do not belong together"
        )


def _printable_alphabet() -> dict[int, int]:
    """Character -> byte of GPT-2's printable alphabet: printable Latin-1 stands for itself, the others follow at 256.

    Latin-1 characters outside the alphabet map beyond Latin-1, so that encoding the result fails on them.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = dict.fromkeys(others, 65535)
    table.update((256 + index, byte) for index, byte in enumerate(others))
    return table


def _added_tokens(config: Mapping[str, Any], path: Path) -> tuple[dict[str, int], frozenset[str]]:
    added: dict[str, int] = {}
    special: set[str] = set()
    entries = config.get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        raise TokenizerError(
            f"{path}: added_tokens_decoder is {type(entries).__name__}; expected an object of id: token"
        )
    for key, entry in entries.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not key.isdecimal() or int(key) >= MAX_VOCAB or not isinstance(content, str) or len(content) < 2:
            raise TokenizerError(
                f"{path}: added_tokens_decoder[{key!r}] is {entry!r}; expected an id below {MAX_VOCAB} "
                "and an object with a content of two or more characters"
            )
        if any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise TokenizerError(f"{path}: added token {content!r} sets lstrip, rstrip or single_word; not supported")
        if content in added:
            raise TokenizerError(f"{path}: added token {content!r} has two ids, {added[content]} and {key}")
        added[content] = int(key)
        if entry.get("special"):
            special.add(content)
    return added, frozenset(special)


def _check_added_ids(added: Mapping[str, int], ranks: Mapping[bytes, int], path: Path) -> None:
    owners = {rank: token for token, rank in ranks.items()}
    for content, rank in added.items():
        if rank in owners:
            raise TokenizerError(f"{path}: added token {content!r} has id {rank}, which is token {owners[rank]!r}")
        owners[rank] = content.encode("utf-8", "replace")


def _named_tokens(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    named: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            continue
        if not isinstance(text, str):
            raise TokenizerError(f"{path}: {name} is {value!r}; expected a string")
        named[name] = text
    return named


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja wins; in tokenizer_config.json it is a string or a list of which "default" is taken."""
    own_file = folder / "chat_template.jinja"
    if own_file.exists():
        return _read_text(own_file)
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {type(value).__name__}; expected text"
        )
    return value


def _model_vocab_size(folder: Path) -> int:
    """`vocab_size` of config.json: the rows of the model's output, which are padded in some models; 0 if not given."""
    path = folder / "config.json"
    if not path.exists():
        return 0
    size = _read_json_object(path).get("vocab_size", 0)
    if type(size) is not int or not 0 <= size <= MAX_VOCAB:
        raise TokenizerError(f"{path}: vocab_size is {size!r}; expected an integer in 0..{MAX_VOCAB}")
    return size


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"{path}: cannot be read ({error.strerror}); the model folder must hold this file"
        ) from error


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: byte {error.start} is not UTF-8; fetch the file again") from error


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a JSON {type(value).__name__}; expected an object")
    return value
