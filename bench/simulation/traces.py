"""Trace files: recorded arrivals with the lengths of prompt and answer, and perhaps what prompts share.

Two forms are read, told apart by the file's name. `.csv` is that of the Azure LLM inference traces (Splitwise, ISCA
2024): TIMESTAMP,ContextTokens,GeneratedTokens. `.jsonl` is that of the Mooncake traces (FAST 2025): an object a line
with timestamp (milliseconds), input_length, output_length and, if known, hash_ids: one a block of the prompt, the last
of which may be partial; equal ids mean that the prompts are equal from their beginning to the end of that block.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Hashable, Iterator
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from minivllm.errors import ConfigError
from minivllm.options import check_choice, check_float, check_int, reject_unknown, show
from simulation.workload import FIRST_PROMPT_TOKEN, MOST_PRIORITIES, Arrival, Given, Run

CSV_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
JSON_FIELDS = ["timestamp", "input_length", "output_length", "hash_ids", "priority"]
_LONGEST = 10_000_000  # tokens of one prompt or answer; a trace beyond that is broken
_TIME = re.compile(r"(.*?)(\.\d+)?(Z|[+-]\d\d:\d\d)?")


def read_trace(path: Path, *, limit: int | None = None, hash_block_tokens: int = 512) -> Given:
    """The first `limit` requests of the file, by time from 0; hash_block_tokens: the block size of its hash_ids.

    Raises ConfigError, naming file and line, for anything that is not of the form, and for a file without requests.
    """
    if limit is not None:
        check_int("limit", limit, 1, None, ConfigError)
    check_int("hash_block_tokens", hash_block_tokens, 1, _LONGEST, ConfigError)
    check_choice("the ending of the trace's name", path.suffix, (".csv", ".jsonl"), ConfigError)
    lines, convert = (_csv_lines, _csv_row) if path.suffix == ".csv" else (_json_lines, _json_row)
    prompts, listed, number = _Prompts(hash_block_tokens), [], 1
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, raw in islice(lines(file), limit):  # noqa: B007 (an error names it)
                listed.append(_arrival(convert(raw), prompts))
    except (ConfigError, csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}, line {number}: {error}") from None
    if not listed:
        raise ConfigError(f"{path} holds no requests")
    listed.sort(key=lambda arrival: arrival.time)  # stable: equal times keep their order
    begin = listed[0].time
    for arrival in listed:
        arrival.time -= begin
    return Given(listed=listed)


def parse_time(text: str) -> float:
    """Seconds: a plain number, or a date and time, whose fraction may have any number of digits; no zone means UTC."""
    try:
        return float(text)
    except ValueError:
        match = _TIME.fullmatch(text.strip())
    try:
        assert match is not None, "every text matches"
        whole, fraction, zone = match.groups()
        moment = datetime.fromisoformat(whole + (zone or "").replace("Z", "+00:00"))
    except ValueError:
        raise ConfigError(
            f"TIMESTAMP is {show(text)}; it must be seconds or a date such as 2023-11-16 18:15:46.68"
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return moment.timestamp() + float(fraction or 0)


class _Prompts:
    """Makes prompts: each hash becomes a token id of its own, and what no hash names gets a new one."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._token_of: dict[Hashable, int] = {}
        self._next = FIRST_PROMPT_TOKEN

    def runs(self, length: int, hashes: list[Hashable]) -> list[Run]:
        size = self._block_tokens
        most = -(-length // size)
        if len(hashes) > most:
            raise ConfigError(f"there are {len(hashes)} hash_ids, but {length} tokens are only {most} blocks of {size}")
        runs = [(self._token(name), min(size, length - index * size)) for index, name in enumerate(hashes)]
        rest = length - len(hashes) * size
        return runs if rest <= 0 else [*runs, (self._new(), rest)]

    def _token(self, name: Hashable) -> int:
        if name not in self._token_of:
            self._token_of[name] = self._new()
        return self._token_of[name]

    def _new(self) -> int:
        self._next += 1
        return self._next - 1


def _arrival(row: dict[str, Any], prompts: _Prompts) -> Arrival:
    time = check_float("timestamp", row["timestamp"], float("-inf"), float("inf"), ConfigError)
    length = check_int("the prompt's length", row["input_length"], 1, _LONGEST, ConfigError)
    answer = check_int("the answer's length", row["output_length"], 1, _LONGEST, ConfigError)
    priority = check_int("priority", row.get("priority", 0), 0, MOST_PRIORITIES - 1, ConfigError)
    return Arrival(time, prompts.runs(length, row.get("hash_ids", [])), answer, priority)


def _csv_lines(file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """(line number, values); the first line must be the header."""
    rows = csv.reader(file)
    header = next(rows, [])
    if header != CSV_COLUMNS:
        raise ConfigError(f"the columns are {show(header)}; they must be {','.join(CSV_COLUMNS)}")
    for row in rows:
        yield rows.line_num, row


def _csv_row(values: list[str]) -> dict[str, Any]:
    if len(values) != len(CSV_COLUMNS):
        raise ConfigError(f"there are {len(values)} values; a row has {len(CSV_COLUMNS)}")
    time, prompt, answer = values
    return {"timestamp": parse_time(time), "input_length": _integer(prompt), "output_length": _integer(answer)}


def _integer(text: str) -> Any:
    return int(text) if re.fullmatch(r"-?\d{1,18}", text.strip()) else text


def _json_lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """(line number, text) of the lines that hold something."""
    return ((number, text) for number, text in enumerate(file, start=1) if text.strip())


def _json_row(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"this is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{show(row)} is no object")
    reject_unknown(row, JSON_FIELDS, "a row of a trace", ConfigError)
    missing = [name for name in JSON_FIELDS[:3] if name not in row]
    if missing:
        raise ConfigError(f"the field {missing[0]} is missing")
    milliseconds = check_float("timestamp", row["timestamp"], float("-inf"), float("inf"), ConfigError)
    hashes = row.get("hash_ids", [])
    if not isinstance(hashes, list) or not all(isinstance(name, int | str) for name in hashes):
        raise ConfigError(f"hash_ids is {show(hashes)}; it must be a list of integers or strings")
    return {**row, "timestamp": milliseconds / 1000, "hash_ids": hashes}
