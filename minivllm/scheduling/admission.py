"""Whether the cache has room for one more request, now and at the worst moment to come."""

from __future__ import annotations

from collections.abc import Iterable

from minivllm.cache.block_manager import BlockManager, Prefix
from minivllm.request import Request
from minivllm.scheduling.forecast import Demand, LengthForecast, peak_demand


class Admission:
    """Follows how long answers get and what the running requests were promised at most."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._lengths = LengthForecast()
        self._num_promised = 0  # blocks that the requests with a table can need at most

    def opened(self, request: Request) -> None:
        """`request` has got a block table."""
        self._num_promised += self._blocks.blocks_for(request.num_to_schedule)

    def closed(self, request: Request) -> None:
        """`request` has lost its block table."""
        self._num_promised -= self._blocks.blocks_for(request.num_to_schedule)

    def ended(self, request: Request) -> None:
        """The answer of `request` is complete."""
        self._lengths.record(len(request.output_token_ids))

    def fits(self, request: Request, prefix: Prefix, running: Iterable[Request]) -> bool:
        """Whether `request`, which begins with `prefix`, may join the `running` ones.

        The first token must fit in any case, so that an admitted request is never without a row. Beside nobody that is
        enough, as every request alone fits the cache. Else everybody's longest answer must fit, or at least everybody's
        likely one at the worst moment.
        """
        blocks = self._blocks
        num_shared = prefix.num_tokens // blocks.block_size
        available = blocks.num_available - prefix.num_unpinned
        if blocks.blocks_for(prefix.num_tokens + 1) - num_shared > available:
            return False
        outstanding = self._num_promised - blocks.num_entries
        if outstanding + blocks.blocks_for(request.num_to_schedule) - num_shared <= available:
            return True
        demands = [self._demand(one) for one in running]
        if not demands:
            return True
        num_private = blocks.blocks_for(request.num_known) - num_shared
        demands.append(Demand(self._remaining(request), request.num_known, num_shared, num_private))
        return peak_demand(demands, blocks.block_size) <= available

    def _demand(self, request: Request) -> Demand:
        slot = request.slot
        assert slot is not None, "a running request has a slot"
        blocks = self._blocks
        return Demand(
            self._remaining(request),
            max(request.num_known, request.num_scheduled),
            blocks.table_length(slot),
            blocks.num_private(slot),
        )

    def _remaining(self, request: Request) -> int:
        """Decode steps that `request` will likely take from now on."""
        generated = max(len(request.output_token_ids), request.num_scheduled - len(request.prompt_token_ids) + 1)
        if request.params.ignore_eos and not request.stop_ids:
            return request.max_tokens - generated  # nothing but a stop string can end it earlier
        return self._lengths.expect(generated, request.max_tokens) - generated

    def check(self, running: Iterable[Request]) -> None:
        """Assert that the promises are those of the requests with a table."""
        promised = sum(self._blocks.blocks_for(request.num_to_schedule) for request in running)
        assert promised == self._num_promised, "promises differ from the requests with a table"
