"""Whether the cache has room for one more request, now and at the worst moment to come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

from minivllm.cache.block_manager import BlockManager, Prefix
from minivllm.request import Request
from minivllm.scheduling.forecast import Demand, LengthForecast, peak_demand


class Admission:
    """Follows how long answers get and what the running requests were promised at most."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._lengths = LengthForecast()
        self._num_promised = 0  # blocks that the requests with a table can need at most
        self._decoding: list[tuple[Request, Demand]] = []  # of this step, in order, as far as they were looked at

    def opened(self, request: Request) -> None:
        """`request` has got a block table."""
        self._num_promised += self._blocks.blocks_for(request.num_to_schedule)

    def closed(self, request: Request) -> None:
        """`request` has lost its block table."""
        self._num_promised -= self._blocks.blocks_for(request.num_to_schedule)

    def ended(self, request: Request) -> None:
        """The answer of `request` is complete."""
        self._lengths.record(len(request.output_token_ids))

    def begin_step(self) -> None:
        """The decode rows of a step are scheduled: what they hold does not change before the next step."""
        self._decoding.clear()

    def shortage(
        self, request: Request, prefix: Prefix, decoding: Mapping[int, Request], prefilling: Iterable[Request]
    ) -> int:
        """How many blocks too few there are for `request`, which begins with `prefix`, to join the running ones.

        The first token must fit in any case, so that an admitted request is never without a row. Beside nobody that is
        enough, as every request alone fits the cache. Else everybody's longest answer must fit, or at least everybody's
        likely one at the worst moment.

        Not positive where it may join. Else it may not before requests have left whose `most_given_back` adds up to as
        much; but it shrinks by itself too, by a block in block_size steps at most, as a request that begins later has
        grown less when another ends.
        """
        blocks = self._blocks
        num_shared = prefix.num_tokens // blocks.block_size
        available = blocks.num_available - prefix.num_unpinned
        needed_now = blocks.blocks_for(prefix.num_tokens + 1) - num_shared
        if needed_now > available:
            return needed_now - available
        outstanding = self._num_promised - blocks.num_entries
        most = outstanding + blocks.blocks_for(request.num_to_schedule) - num_shared - available
        if most <= 0:
            return 0
        demands = self._demands(decoding, prefilling, prefix.blocks[:num_shared])
        if not demands:
            return 0
        num_private = blocks.blocks_for(request.num_known) - num_shared
        demands.append(Demand(self._remaining(request), request.num_known, num_shared, num_private))
        return min(most, peak_demand(demands, blocks.block_size) - available)  # the forecast may round up

    def most_given_back(self, request: Request) -> int:
        """By how much the end of `request` can lower the `shortage` of another: what it was promised, and the two
        blocks by which the forecast may round its use up."""
        return self._blocks.blocks_for(request.num_to_schedule) + 2

    def _demands(
        self, decoding: Mapping[int, Request], prefilling: Iterable[Request], begun: list[int]
    ) -> list[Demand]:
        """Of all that run, if another comes that begins with the blocks `begun`."""
        known = self._decoding
        if begun:  # what the newcomer shares is not private to others any more
            known[:] = [
                (one, self._demand(one, begun) if self._blocks.begins_with(one.slot, begun[0]) else demand)
                for one, demand in known
            ]
        known += [(one, self._demand(one, begun)) for one in islice(decoding.values(), len(known), None)]
        return [demand for _, demand in known] + [self._demand(one, begun) for one in prefilling]

    def _demand(self, request: Request, begun: list[int]) -> Demand:
        slot = request.slot
        assert slot is not None, "a running request has a slot"
        blocks = self._blocks
        return Demand(
            self._remaining(request),
            max(request.num_known, request.num_scheduled),
            blocks.table_length(slot),
            blocks.num_private(slot, begun),
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
