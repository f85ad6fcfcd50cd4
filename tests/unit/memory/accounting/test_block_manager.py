import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.memory.accounting.block_manager import (
    BlockManager,
    IntegrityError,
    OutOfPagesError,
    Owner,
)


def test_null_page_is_never_handed_out() -> None:
    blocks = BlockManager(5)
    page_ids = blocks.allocate(Owner.KV, 4)
    assert sorted(page_ids) == [1, 2, 3, 4]
    with pytest.raises(OutOfPagesError):
        blocks.allocate(Owner.KV, 1)
    blocks.check_integrity([(page_id, Owner.KV, 1) for page_id in page_ids])


def test_failed_allocation_takes_nothing() -> None:
    blocks = BlockManager(4)
    with pytest.raises(OutOfPagesError):
        blocks.allocate(Owner.ADAPTER, 4)
    assert blocks.num_free == 3
    blocks.check_integrity([])


def test_shared_page_is_freed_by_its_last_holder() -> None:
    blocks = BlockManager(4)
    (page_id,) = blocks.allocate(Owner.KV, 1)
    blocks.share(page_id)
    blocks.check_integrity([(page_id, Owner.KV, 2)])
    assert not blocks.release(page_id)
    assert blocks.release(page_id)
    blocks.check_integrity([])


def test_idle_prefix_block_is_revived_by_sharing() -> None:
    blocks = BlockManager(4)
    (page_id,) = blocks.allocate(Owner.KV, 1)
    blocks.release(page_id, keep=True)
    assert blocks.owner(page_id) is Owner.PREFIX
    assert blocks.num_free == 2
    blocks.share(page_id)
    assert blocks.owner(page_id) is Owner.KV
    blocks.release(page_id, keep=True)
    blocks.discard(page_id)
    assert blocks.num_free == 3
    blocks.check_integrity([])


def test_misuse_is_refused() -> None:
    blocks = BlockManager(6)
    (adapter_page,) = blocks.allocate(Owner.ADAPTER, 1)
    (kv_page,) = blocks.allocate(Owner.KV, 1)
    with pytest.raises(IntegrityError, match="cannot be shared"):
        blocks.share(adapter_page)
    with pytest.raises(IntegrityError, match="no idle prefix block"):
        blocks.discard(kv_page)
    blocks.release(kv_page)
    with pytest.raises(IntegrityError, match="without a reference"):
        blocks.release(kv_page)
    with pytest.raises(ValueError, match="KV or ADAPTER"):
        blocks.allocate(Owner.PREFIX, 1)
    with pytest.raises(ValueError, match="at least 2 pages"):
        BlockManager(1)


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        ([], "claim FREE"),  # leaked
        ([(1, Owner.KV, 2)], "claim KV with 2"),
        ([(1, Owner.ADAPTER, 1)], "claim ADAPTER"),
        ([(1, Owner.KV, 1), (2, Owner.KV, 1)], "claim KV with 1"),  # 2 is free
        ([(1, Owner.KV, 1), (1, Owner.ADAPTER, 1)], "two tenants"),
        ([(0, Owner.KV, 1)], "does not exist"),
        ([(9, Owner.KV, 1)], "does not exist"),
    ],
)
def test_integrity_check_finds_a_wrong_claim(
    claims: list[tuple[int, Owner, int]], text: str
) -> None:
    blocks = BlockManager(5)
    assert blocks.allocate(Owner.KV, 1) == [1]
    blocks.check_integrity([(1, Owner.KV, 1)])
    with pytest.raises(IntegrityError, match=text):
        blocks.check_integrity(claims)


def test_integrity_check_finds_corrupted_books() -> None:
    lost, doubled, null = BlockManager(5), BlockManager(5), BlockManager(5)
    lost._free.pop()
    doubled._free.append(1)
    null._free.append(0)
    for blocks in (lost, doubled, null):
        with pytest.raises(IntegrityError):
            blocks.check_integrity([])


@given(st.data())
def test_random_use_keeps_the_books(data: st.DataObject) -> None:
    """Against a model that is a plain dictionary of page id to (owner, references)."""
    blocks = BlockManager(data.draw(st.integers(2, 12)))
    model: dict[int, tuple[Owner, int]] = {}
    for _ in range(data.draw(st.integers(1, 30))):
        kv = [page for page, (owner, _) in model.items() if owner is Owner.KV]
        idle = [page for page, (owner, _) in model.items() if owner is Owner.PREFIX]
        action = data.draw(st.sampled_from(["allocate", "share", "release", "discard"]))
        if action == "allocate":
            owner = data.draw(st.sampled_from([Owner.KV, Owner.ADAPTER]))
            count = data.draw(st.integers(0, 4))
            if count <= blocks.num_usable - len(model):
                for page in blocks.allocate(owner, count):
                    assert page not in model
                    model[page] = (owner, 1)
            else:
                with pytest.raises(OutOfPagesError):
                    blocks.allocate(owner, count)
        elif action == "share" and kv + idle:
            page = data.draw(st.sampled_from(kv + idle))
            blocks.share(page)
            model[page] = (Owner.KV, model[page][1] + 1)
        elif action == "release" and kv:
            page, keep = data.draw(st.sampled_from(kv)), data.draw(st.booleans())
            count = model[page][1] - 1
            assert blocks.release(page, keep=keep) == (count == 0)
            model[page] = (Owner.KV if count else Owner.PREFIX, count)
            if not count and not keep:
                del model[page]
        elif action == "discard" and idle:
            page = data.draw(st.sampled_from(idle))
            blocks.discard(page)
            del model[page]
        blocks.check_integrity((page, *held) for page, held in model.items())


def test_a_page_remembers_how_many_steps_were_planned_when_it_was_released() -> None:
    blocks = BlockManager(6)
    pages = blocks.allocate(Owner.KV, 3)
    assert blocks.num_planned_at_release(pages) == 0
    for count, page_id in zip((4, 7, 9), pages, strict=True):
        blocks.num_planned = count
        blocks.release(page_id, keep=page_id == pages[0])
    blocks.num_planned = 12
    blocks.discard(pages[0])  # no request has used it since it became idle
    assert [blocks.num_planned_at_release([page_id]) for page_id in pages] == [4, 7, 9]
    assert blocks.num_planned_at_release(pages) == 9
    (other,) = blocks.allocate(Owner.ADAPTER, 1)
    blocks.release(other, num_planned=5)
    assert blocks.num_planned_at_release([other]) == 5


def test_pages_freed_first_are_handed_out_first() -> None:
    blocks = BlockManager(5)
    pages = blocks.allocate(Owner.KV, 4)
    for page_id in (pages[2], pages[0], pages[3]):
        blocks.release(page_id)
    assert blocks.allocate(Owner.KV, 3) == [pages[2], pages[0], pages[3]]
