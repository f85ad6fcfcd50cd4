"""N-grams are found as by a search of the whole text, and drafts begin and end as they pay."""

import random
from array import array
from collections.abc import Iterator

import pytest

from loraplex.scheduler.speculation.drafter import MAX_INDEXED, Drafter
from loraplex.scheduler.speculation.ngram_index import NOT_FOUND, NgramIndex
from loraplex.scheduler.speculation.speculation_config import SpeculationConfig, parse_speculation


def search(text: list[int], shortest: int, longest: int) -> int:
    """Returns where the last earlier occurrence of the text's longest final n-gram ends."""
    for size in range(longest, shortest - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if size <= len(text) and text[end - size : end] == text[len(text) - size :]:
                return end
    return NOT_FOUND


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (2, 2), (1, 3), (2, 4)])
def test_an_ngram_is_found_where_it_occurred_last(shortest: int, longest: int) -> None:
    rng = random.Random(shortest + 10 * longest)
    text = [rng.randrange(3) for _ in range(200)]
    index = NgramIndex(shortest, longest)
    for end in range(1, len(text) + 1):
        found = index.add(array("i", text), end)
        assert found == search(text[:end], shortest, longest)


def make_drafter(num_prompt_tokens: int = 0, *, stop_ids: tuple[int, ...] = ()) -> Drafter:
    config = SpeculationConfig("ngram", num_speculative_tokens=8, prompt_lookup_max=2)
    return Drafter(config, num_prompt_tokens=num_prompt_tokens, stop_ids=stop_ids)


def follow(drafter: Drafter, text: list[int], start: int = 1) -> Iterator[list[int]]:
    for end in range(start, len(text) + 1):
        yield list(drafter.draft(array("i", text[:end])))


PROMPT = list(range(100, 140))


def test_an_answer_that_repeats_its_prompt_is_drafted() -> None:
    """The first guess comes after two tokens, and the first draft once it was right."""
    drafts = list(follow(make_drafter(len(PROMPT)), PROMPT + PROMPT[5:20], len(PROMPT)))
    assert drafts[:3] == [[], [], []]
    assert drafts[3] == PROMPT[8:11]
    assert [len(draft) for draft in drafts[3:]] == sorted(len(draft) for draft in drafts[3:])
    for place, draft in enumerate(drafts[3:], 8):
        assert draft == PROMPT[place : place + len(draft)]


def test_a_copy_goes_on_past_the_end_of_the_text() -> None:
    *_, draft = follow(make_drafter(), [7, 8, 9] * 10)
    assert draft == [7, 8, 9, 7, 8, 9, 7, 8]


def test_wrong_guesses_end_the_drafts() -> None:
    rng = random.Random(5)
    text = [rng.randrange(4) for _ in range(400)]
    num_drafted = sum(1 for draft in follow(make_drafter(), text) if draft)
    assert num_drafted < 40  # chance makes some guesses in a row right


def test_drafts_begin_again_where_the_text_repeats_itself() -> None:
    rng = random.Random(6)
    text = [rng.randrange(4) for _ in range(100)] + [5, 6, 7] * 6
    *_, draft = follow(make_drafter(), text)
    assert len(draft) > 2


@pytest.mark.parametrize(
    ("edited", "num_kept"),
    [
        pytest.param([*PROMPT[:15], 7, *PROMPT[16:20]], 4, id="another token"),
        pytest.param([*PROMPT[:15], *PROMPT[17:20]], 2, id="two left out"),
        pytest.param([*PROMPT[:15], 7, 8, *PROMPT[15:20]], 4, id="two added"),
    ],
)
def test_drafts_go_on_after_an_edit(edited: list[int], num_kept: int) -> None:
    """Sooner than an n-gram is found again: while only `num_kept` tokens agree, or fewer."""
    config = SpeculationConfig("ngram", num_speculative_tokens=8, prompt_lookup_max=5)
    drafter = Drafter(config, num_prompt_tokens=len(PROMPT), stop_ids=())
    *_, draft = follow(drafter, PROMPT + edited, len(PROMPT))
    assert num_kept < config.longest
    assert draft == PROMPT[20 : 20 + len(draft)] != []


def test_a_source_that_is_left_for_good_is_given_up() -> None:
    """Then the rate of right guesses falls no more, and drafts soon begin again."""
    others = list(range(200, 230))
    text = PROMPT + PROMPT[:15] + others + PROMPT[20:26]
    drafts = list(follow(make_drafter(len(PROMPT)), text, len(PROMPT)))
    assert not any(drafts[20 : 15 + len(others)])
    assert drafts[-1] == PROMPT[26 : 26 + len(drafts[-1])] != []


def test_no_stop_id_is_drafted() -> None:
    text = PROMPT + PROMPT[:20]
    drafts = list(follow(make_drafter(len(PROMPT), stop_ids=(PROMPT[18],)), text, len(PROMPT)))
    assert any(drafts) and all(PROMPT[18] not in draft for draft in drafts)
    assert drafts[-3] == [] and drafts[-1] == PROMPT[20 : 20 + len(drafts[-1])]


def test_a_long_prompt_is_indexed_in_parts() -> None:
    """Nothing is drafted until all of it is; then the answer's first tokens find their place."""
    prompt = list(range(3 * MAX_INDEXED))
    text = prompt + prompt[10:30]
    drafts = list(follow(make_drafter(len(prompt)), text, len(prompt)))
    assert drafts[:2] == [[], []] and drafts[-1] == prompt[30 : 30 + len(drafts[-1])] != []


def test_settings_are_those_of_vllm() -> None:
    assert parse_speculation("") is None
    config = parse_speculation('{"method": "ngram", "num_speculative_tokens": 4}')
    assert config and (config.num_speculative_tokens, config.shortest, config.longest) == (4, 3, 3)
    config = parse_speculation(
        '{"method": "ngram", "prompt_lookup_max": 5, "prompt_lookup_min": 2}'
    )
    assert config and (config.shortest, config.longest) == (2, 5)
    config = parse_speculation('{"method": "ngram", "prompt_lookup_max": 4}')
    assert config and (config.shortest, config.longest) == (4, 4)
    assert parse_speculation("ngram") == SpeculationConfig("ngram")


@pytest.mark.parametrize(
    "text",
    [
        "eagle",
        '{"method": "eagle"}',
        '{"method": "ngram", "num_speculative_tokens": 0}',
        '{"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3}',
        '{"method": "ngram", "tokens": 3}',
    ],
)
def test_other_settings_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"speculative_config: .*\"method\": \"ngram\""):
        parse_speculation(text)
