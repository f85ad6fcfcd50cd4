"""Two requests share a block if and only if every token up to its end has the same weights."""

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.memory.accounting.block_chain import BlockChain
from loraplex.scheduler.adapters.binding import (
    Binding,
    distinct_versions,
    last_occurrence,
    weight_changes,
)
from loraplex.scheduler.adapters.version import AdapterState, AdapterVersion
from loraplex.scheduler.frontend_protocol import AdapterSource

BLOCK = 3
LENGTH = 14
CONTENTS = ("red", "green", "blue")
VERSIONS = {
    name: AdapterVersion(
        name, AdapterSource.at(f"/{name}"), 1, state=AdapterState.READY, content_hash=name
    )
    for name in CONTENTS
}

bindings_of = st.lists(
    st.builds(
        Binding,
        st.sampled_from([*VERSIONS.values()]),
        st.sampled_from([1.0, 0.5, -1.0]),
        st.integers(0, LENGTH + 2),
    ),
    max_size=3,
    unique_by=lambda binding: binding.version.name,
)
tokens_of = st.lists(st.integers(0, 1), min_size=LENGTH, max_size=LENGTH)


def weights_at(bindings: list[Binding], position: int) -> frozenset[tuple[str, float]]:
    return frozenset(
        (b.version.content_hash, b.weight) for b in bindings if b.first_position <= position
    )


@settings(max_examples=200, deadline=None)
@given(tokens_of, tokens_of, st.booleans(), bindings_of, bindings_of, st.data())
def test_blocks_are_shared_iff_all_tokens_have_the_same_weights(
    one: list[int],
    other: list[int],
    same_tokens: bool,
    first: list[Binding],
    second: list[Binding],
    data: st.DataObject,
) -> None:
    if same_tokens:
        other = one
    if data.draw(st.booleans()):  # often the same adapters in another order, or some of them
        second = data.draw(st.permutations(first))[: data.draw(st.integers(0, 3))]
    chains = []
    for tokens, bindings in ((one, first), (other, second)):
        chain = BlockChain(b"root", BLOCK, weight_changes(bindings))
        chain.extend(array("i", tokens), LENGTH // BLOCK)
        chains.append(chain.hashes)
    for block, (left, right) in enumerate(zip(*chains, strict=True)):
        end = (block + 1) * BLOCK
        is_same = one[:end] == other[:end] and all(
            weights_at(first, at) == weights_at(second, at) for at in range(end)
        )
        assert (left == right) == is_same, f"block {block}"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 256, 65536, 1 << 24]), max_size=12),
    st.lists(st.sampled_from([0, 1, 256, 65536, 1 << 24]), min_size=1, max_size=3),
)
def test_last_occurrence(tokens: list[int], sought: list[int]) -> None:
    """The ids have equal bytes at other places, which must not count."""
    places = [at for at in range(len(tokens)) if tokens[at : at + len(sought)] == sought]
    assert last_occurrence(array("i", tokens), array("i", sought)) == max(places, default=-1)


def test_one_content_under_two_names_is_loaded_once() -> None:
    other = AdapterVersion("copy", AdapterSource.at("/c"), 1, content_hash="red")
    unread = AdapterVersion("new", AdapterSource.at("/n"), 1)
    bindings = [Binding(VERSIONS["red"]), Binding(other), Binding(unread)]
    assert list(distinct_versions(bindings)) == ["red"]
