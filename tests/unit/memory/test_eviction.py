from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from loraplex.memory.block_manager import Owner
from loraplex.memory.eviction import Candidate, choose_victims


def adapters(*uses: tuple[float, int]) -> list[Candidate]:
    return [Candidate(use, Owner.ADAPTER, f"a{use}", pages) for use, pages in uses]


def blocks(*uses: float) -> list[Candidate]:
    return [Candidate(use, Owner.PREFIX, int(use), 1) for use in uses]


def test_one_order_over_both_tenants() -> None:
    victims = choose_victims(5, adapters((2.0, 2), (5.0, 9)), blocks(1.0, 3.0, 4.0, 6.0))
    assert [victim.last_use for victim in victims] == [1.0, 2.0, 3.0, 4.0]


def test_nothing_more_than_needed_is_read() -> None:
    def endless() -> Iterator[Candidate]:
        for use in range(10):
            assert use < 4, "read too far"
            yield Candidate(float(use), Owner.PREFIX, use, 1)

    assert len(choose_victims(2, [], endless())) == 2


def test_nothing_needed_nothing_evicted() -> None:
    assert choose_victims(0, adapters((1.0, 2)), blocks(1.0)) == []


def test_all_are_offered_when_they_do_not_suffice() -> None:
    assert len(choose_victims(100, adapters((1.0, 2)), blocks(2.0, 3.0))) == 3


@given(
    st.lists(st.tuples(st.floats(0, 9), st.integers(1, 5)), max_size=8),
    st.lists(st.floats(0, 9), max_size=8),
    st.integers(0, 20),
)
def test_victims_are_the_oldest_and_no_more(
    adapter_uses: list[tuple[float, int]], block_uses: list[float], num_pages: int
) -> None:
    all_adapters, all_blocks = adapters(*sorted(adapter_uses)), blocks(*sorted(block_uses))
    victims = choose_victims(num_pages, all_adapters, all_blocks)
    spared = [c for c in all_adapters + all_blocks if not any(c is victim for victim in victims)]
    freed = sum(victim.num_pages for victim in victims)
    assert freed >= num_pages or not spared
    if victims:
        assert freed - victims[-1].num_pages < num_pages
        assert all(victims[-1].last_use <= candidate.last_use for candidate in spared)
