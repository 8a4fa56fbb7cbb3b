"""The requests that hold a slot, and what comes and goes with one: the block table, and the runner's copy of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from minivllm.cache.block_manager import BlockManager, Prefix
from minivllm.cache.radix_tree import token_key
from minivllm.request import FinishReason, Request
from minivllm.scheduling.admission import Admission
from minivllm.scheduling.flight import Flight


class RunningSet:
    """Who runs, and what of it the scheduler goes through each step.

    prefilling: prompts that were begun and have tokens left to schedule, the most urgent first.
    decoding: slot -> request that gets one token a step. computing: those of whose known tokens some have not come
    back. A request that was taken out of these keeps its slot until `release`.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int) -> None:
        self.prefilling: list[Request] = []
        self.decoding: dict[int, Request] = {}
        self.computing: dict[Request, None] = {}  # a set in order, so that equal runs decide equally
        self.admission = Admission(blocks)
        self._blocks = blocks
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._max_num_seqs = max_num_seqs
        self._changes: list[tuple[int, int, int]] = []  # (slot, index, block) that the runner must learn

    @property
    def has_free_slot(self) -> bool:
        """Whether `start` can be called."""
        return bool(self._free_slots)

    @property
    def is_idle(self) -> bool:
        """Whether nobody holds a slot."""
        return len(self._free_slots) == self._max_num_seqs

    def requests(self) -> list[Request]:
        """Prefilling and decoding ones."""
        return [*self.prefilling, *self.decoding.values()]

    def start(self, flight: Flight, request: Request, prefix: Prefix) -> None:
        """Give `request` a slot and a block table that begins with `prefix`; the caller puts it into its place."""
        slot = request.slot = self._free_slots.pop()
        copies = self._blocks.open(slot, prefix, request.cache_salt)
        flight.add_start(request, slot, self._blocks.table(slot), copies)
        self.admission.opened(request)
        self.computing[request] = None
        request.num_scheduled = prefix.num_tokens

    def computed(self, request: Request, num_tokens: int) -> None:
        """The first `num_tokens` known tokens of `request` are computed: others may share them from now on."""
        slot = slot_of(request)
        self._changes += [(slot, *change) for change in self._blocks.commit(slot, request.key, num_tokens)]
        if num_tokens == request.num_known:
            self.computing.pop(request, None)

    def add_changes(self, flight: Flight) -> None:
        """Let the next batch tell the runner which shared blocks took the place of a request's own."""
        for slot, index, block in self._changes:
            flight.add_entries(slot, [(index, block)])
        self._changes.clear()

    def take_out(self, request: Request) -> None:
        """Schedule no more of `request`."""
        if self.decoding.get(slot_of(request)) is request:
            del self.decoding[slot_of(request)]
        else:
            self.prefilling.remove(request)
        self.computing.pop(request, None)

    def release(self, slot: int, request: Request) -> None:
        """Give back the slot and the blocks; what was computed stays cached, if it was right."""
        if self._blocks.prefix_caching and request.finish_reason is not FinishReason.ERROR:
            self._blocks.commit(slot, full_key(request), min(request.num_scheduled, num_tokens_of(request)))
        self._blocks.release(slot)
        self.admission.closed(request)
        self._free_slots.append(slot)
        request.slot = None
        self._changes = [change for change in self._changes if change[0] != slot]

    def check(self, leaving: Iterable[tuple[int, Request]], urgency: Callable[[Request], tuple[int, int]]) -> None:
        """Assert every invariant, given those that left and keep their slot until a batch lands."""
        held = [*self.decoding.items(), *((slot_of(request), request) for request in self.prefilling), *leaving]
        slots = [slot for slot, _ in held]
        assert sorted(slots + self._free_slots) == list(range(self._max_num_seqs)), "a slot is lost, or held twice"
        assert all(request.slot == slot for slot, request in held), "a request does not know its slot"
        assert self.computing.keys() <= {request for _, request in held}, "who has no slot computes"
        assert self.prefilling == sorted(self.prefilling, key=urgency), "prompts that were begun are out of order"
        for slot, request in held:
            assert request.num_scheduled <= request.num_to_schedule, f"slot {slot} was scheduled past its end"
            room = self._blocks.table_length(slot) * self._blocks.block_size
            assert 0 <= room - request.num_scheduled < self._blocks.block_size, f"slot {slot} has unfit blocks"
        self.admission.check(request for _, request in held)
        self._blocks.check(slots)


def slot_of(request: Request) -> int:
    """The slot of a request that has one."""
    assert request.slot is not None, f"request {request.label!r} has no slot"
    return request.slot


def num_tokens_of(request: Request) -> int:
    """Prompt and answer so far."""
    return len(request.prompt_token_ids) + len(request.output_token_ids)


def full_key(request: Request) -> bytes:
    """All tokens of `request` in the cache's form; those it had when it last began to wait are converted already."""
    new = request.output_token_ids[request.num_known - len(request.prompt_token_ids) :]
    return request.key + token_key(new)
