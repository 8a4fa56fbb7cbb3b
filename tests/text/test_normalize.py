"""NFC equals CPython's on every kind of run of marks, and stays linear where CPython's is quadratic."""

from __future__ import annotations

import random
import sys
import time
import unicodedata

from minivllm.text.normalize import nfc

MARKS = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.combining(chr(code))]


def test_equals_cpython_on_random_runs(seed: int) -> None:
    rng = random.Random(seed)
    bases = [
        "a",
        "e",
        "\u1ec7",
        "\u0f73",
        "\u0f75",
        "\u0f81",
        "\u0344",
        "\u1100",
        "\u1161",
        "\uac00",
        "<",
        "\U0001f600",
        "",
    ]
    for _ in range(200):
        runs = [rng.choice(bases) + "".join(rng.choices(MARKS, k=rng.choice([0, 1, 3, 63, 64, 200]))) for _ in range(5)]
        text = "".join(runs)
        assert nfc(text) == unicodedata.normalize("NFC", text), ascii(text)


def test_every_character_that_hides_marks_is_known() -> None:
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if not unicodedata.combining(char) and unicodedata.decomposition(char)[:1] not in ("", "<"):
            decomposed = unicodedata.normalize("NFD", char)
            if unicodedata.combining(decomposed[0]):
                assert char in "\u0f73\u0f75\u0f81"


def test_half_a_million_marks_take_linear_time() -> None:
    text = "a" + "\u0345" * 250_000 + "\u0334" * 250_000
    start = time.perf_counter()
    assert nfc(text) == "a" + "\u0334" * 250_000 + "\u0345" * 250_000
    assert time.perf_counter() - start < 5.0
