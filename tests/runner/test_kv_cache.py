from __future__ import annotations

import pytest

from minivllm.errors import ConfigError
from minivllm.runner.kv_cache import CPU_CACHE_BYTES, blocks_that_fit, cpu_cache_bytes

BLOCK_BYTES = 1 << 20


def test_as_many_blocks_as_fit_but_no_more_than_can_be_used() -> None:
    assert blocks_that_fit(100 * BLOCK_BYTES + 5, BLOCK_BYTES, 1000, 160, 16) == 100
    assert blocks_that_fit(100 * BLOCK_BYTES, BLOCK_BYTES, 30, 160, 16) == 30


@pytest.mark.parametrize("free", [-5, 0, 9 * BLOCK_BYTES + 1])
def test_too_little_says_what_is_missing_and_what_would_fit(free: int) -> None:
    fitting = max(free // BLOCK_BYTES, 0)
    with pytest.raises(
        ConfigError, match=rf"needs 10 blocks, but only {fitting} fit .*max_model_len to {fitting * 16}"
    ):
        blocks_that_fit(free, BLOCK_BYTES, 1000, 160, 16)


def test_a_cpu_holds_at_least_one_sequence_where_the_memory_allows() -> None:
    assert cpu_cache_bytes(BLOCK_BYTES, 160, 16) == CPU_CACHE_BYTES
    assert cpu_cache_bytes(BLOCK_BYTES, 5000 * 16, 16) == 5000 * BLOCK_BYTES
    assert cpu_cache_bytes(1 << 50, 160, 16) < 10 << 50  # bounded by what the machine has
