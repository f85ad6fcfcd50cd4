"""Both tenants on one pool, driven at random; its integrity is checked after every operation."""

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.memory.accounting.block_chain import BlockChain
from loraplex.memory.accounting.block_manager import OutOfPagesError
from loraplex.memory.accounting.page_manager import PageManager

BLOCK, NUM_PAGES, MAX_SLOTS = 2, 20, 3


class PoolTraffic(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.unloaded: list[int] = []
        self.memory = PageManager(
            num_pages=NUM_PAGES,
            block_tokens=BLOCK,
            max_adapter_slots=MAX_SLOTS,
            enable_prefix_caching=True,
            unload=self.unloaded.append,
        )
        self.now = 0.0
        self.num_requests = 0
        self.requests: dict[int, array[int]] = {}
        self.chains: list[BlockChain] = []
        self.reserved: list[str] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def open(self, tokens: list[int]) -> None:
        memory, kv = self.memory, self.memory.kv
        token_ids, chain = array("i", tokens), BlockChain(b"r", BLOCK)
        prefix = kv.find_prefix(chain, token_ids).page_ids
        needed = kv.num_pages_for(len(tokens)) - len(prefix)
        if memory.num_available - kv.num_idle_among(prefix) < needed:
            return
        self.num_requests += 1
        kv.open(self.num_requests, chain, prefix)
        memory.make_room(needed)
        assert len(kv.grow(self.num_requests, len(tokens))) == needed
        self.requests[self.num_requests] = token_ids
        self.chains.append(chain)

    @precondition(lambda self: self.chains)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=3, max_size=12))
    def forget(self, data: st.DataObject, tokens: list[int]) -> None:
        """Forget the blocks of a request, be it running or not; nothing shares them later."""
        kv, before = self.memory.kv, self.memory.num_available
        chain = data.draw(st.sampled_from(self.chains))
        kv.forget(chain)
        assert self.memory.num_available == before
        probe = BlockChain(b"r", BLOCK)
        prefix = kv.find_prefix(probe, array("i", tokens))
        assert set(probe.hashes[: len(prefix.page_ids)]).isdisjoint(chain.hashes)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=3, max_size=12))
    def reset(self, tokens: list[int]) -> None:
        """Empty the prefix cache; running requests keep their pages, nothing is shared later."""
        kv, before = self.memory.kv, self.memory.num_available
        kept = {request_id: list(kv.page_ids(request_id)) for request_id in self.requests}
        kv.reset()
        assert (self.memory.num_available, kv.num_idle) == (before, 0)
        assert kept == {request_id: kv.page_ids(request_id) for request_id in self.requests}
        assert not kv.find_prefix(BlockChain(b"r", BLOCK), array("i", tokens)).page_ids

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        token_ids = self.requests[request_id]
        self.memory.kv.register(request_id, token_ids, data.draw(st.integers(0, len(token_ids))))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.memory.kv.release(request_id)
        del self.requests[request_id]

    @rule(name=st.sampled_from("abcdef"), num_pages=st.integers(1, 6))
    def load(self, name: str, num_pages: int) -> None:
        memory = self.memory
        if memory.adapters.get(name):
            return
        if not memory.has_adapter_slot or memory.num_available < num_pages:
            return
        assert memory.make_adapter_slot()
        assert memory.make_room(num_pages)
        memory.adapters.allocate(name, num_pages, self.now)

    @rule()
    def finish_loads(self) -> None:
        for adapter in list(self.memory.adapters):
            if adapter.is_loading:
                self.memory.adapters.finish_load(adapter.content_hash, self.now)

    @rule(name=st.sampled_from("abcdef"))
    def reserve(self, name: str) -> None:
        if self.memory.adapters.get(name):
            self.memory.adapters.reserve(name)
            self.reserved.append(name)

    @precondition(lambda self: self.reserved)
    @rule()
    def unreserve(self) -> None:
        self.memory.adapters.unreserve(self.reserved.pop(0), self.now)

    @rule(num_pages=st.integers(1, NUM_PAGES))
    def make_room(self, num_pages: int) -> None:
        memory, before = self.memory, self.memory.num_owned()
        if num_pages > memory.num_available:
            with pytest.raises(OutOfPagesError):
                memory.make_room(num_pages)
            assert memory.num_owned() == before
        else:
            available = memory.num_available
            assert memory.make_room(num_pages)
            assert memory.num_free >= num_pages
            assert memory.num_available == available

    @invariant()
    def integrity_holds(self) -> None:
        self.now += 1.0
        self.memory.check_integrity()
        held = {page for request in self.requests for page in self.memory.kv.page_ids(request)}
        for name in self.reserved:
            adapter = self.memory.adapters.get(name)
            assert adapter is not None, "a reserved adapter was evicted"
            assert held.isdisjoint(adapter.page_ids)

    def teardown(self) -> None:
        for request_id in self.requests:
            self.memory.kv.release(request_id)
        for name in self.reserved:
            self.memory.adapters.unreserve(name, self.now)
        self.finish_loads()
        assert self.memory.num_available == NUM_PAGES - 1
        self.memory.make_room(NUM_PAGES - 1)
        self.memory.check_integrity()
        assert self.memory.blocks.num_free == NUM_PAGES - 1
        assert not len(self.memory.adapters)


TestPoolTraffic = PoolTraffic.TestCase
TestPoolTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
