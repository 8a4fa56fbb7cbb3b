"""What is refused at the door, and that the message names the numbers and the way out."""

from __future__ import annotations

import random

import pytest

from minivllm.errors import QueueFullError, RequestError
from minivllm.scheduling.limits import Limits


def test_max_tokens_is_lowered_to_what_the_context_leaves() -> None:
    limits = Limits(100, 1000, None)
    assert limits.most_tokens("r", 1, 16) == 16
    assert limits.most_tokens("r", 90, 10) == 10
    assert limits.most_tokens("r", 90, 11) == 10
    assert limits.most_tokens("r", 99, 10**9) == 1


@pytest.mark.parametrize("length", [0, 100, 101, 10**9])
def test_prompts_that_leave_no_room_are_refused(length: int) -> None:
    with pytest.raises(RequestError) as error:
        Limits(100, 1000, None).most_tokens("my name", length, 1)
    for part in ("'my name'", f"has {length} tokens", "from 1 to 99", "max_model_len is 100"):
        assert part in str(error.value)


def test_what_the_cache_cannot_hold_is_refused_with_the_number_that_fits() -> None:
    limits = Limits(1000, 64, None)
    assert limits.most_tokens("r", 50, 15) == 15
    with pytest.raises(RequestError) as error:
        limits.most_tokens("r", 50, 16)
    for part in ("'r'", "prompt of 50 tokens", "max_tokens 16", "at most 65 together", "shorten the prompt"):
        assert part in str(error.value)
    assert limits.most_tokens("r", 64, 1) == 1
    with pytest.raises(RequestError, match="at most 65 together"):
        limits.most_tokens("r", 65, 1)


def test_what_is_accepted_fits_exactly(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(1000):
        limits = Limits(rng.randint(2, 50), rng.randint(1, 50), None)
        length, asked = rng.randint(0, 60), rng.randint(1, 60)
        most = min(asked, limits.max_model_len - length)
        if min(length, most) >= 1 and length + most - 1 <= limits.cache_tokens:
            assert limits.most_tokens("r", length, asked) == most
        else:
            with pytest.raises(RequestError):
                limits.most_tokens("r", length, asked)


def test_the_queue_is_bounded() -> None:
    limits = Limits(100, 1000, 4)
    limits.check_queue(3, 1)
    limits.check_queue(0, 9)  # else one request of many samples could never come in
    for num_waiting, num_new in ((4, 1), (1, 4), (9, 1)):
        with pytest.raises(QueueFullError, match=f"{num_waiting} requests wait already and at most 4 may; try again"):
            limits.check_queue(num_waiting, num_new)
    Limits(100, 1000, None).check_queue(10**6, 10**6)
