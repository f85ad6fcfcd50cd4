"""Plots of the paper benchmarks."""

from typing import Any

from paper_panels import punica_panels, slora_panels, tiers_panels

Row = dict[str, Any]


def test_slora_shows_the_paper_and_first_tokens_of_open_loops() -> None:
    rows: list[Row] = [
        {"setting": "S1", "load": load, "rate": rate, "num_adapters": n, "requests_per_s": 20.0,
         "new_tokens_per_s": 5e3, "ttft_ms_mean": 30.0, "paper_requests_per_s": 8.0}
        for load, rate in (("saturated", None), ("10/s, cv 1", 10.0)) for n in (2000, 5)
    ]  # fmt: skip
    served, rates, ttfts = slora_panels(rows)
    assert served.title == "S1: requests"
    assert [(line.label, line.dashed) for line in served.lines] == [
        ("saturated", False), ("10/s, cv 1", False), ("paper (A100 80GB, 10/s)", True),
    ]  # fmt: skip
    assert [text for _, text in rates.x_ticks] == ["5", "2000"]
    assert [line.label for line in ttfts.lines] == ["10/s, cv 1, mean"]
    assert not slora_panels(rows[:2])[2].lines


def test_slora_joins_no_two_settings_in_one_line() -> None:
    def row(setting: str, n: int, registered: int) -> Row:
        return {"setting": setting, "load": "saturated", "rate": None, "num_adapters": n,
                "num_registered": registered, "requests_per_s": 20.0, "new_tokens_per_s": 5e3,
                "ttft_ms_mean": 30.0, "paper_requests_per_s": 8.0}  # fmt: skip

    rows = [row("S1", 0, 2000), row("S1", 5, 2000), row("S2", 0, 1000), row("S1", 5, 10_000)]
    served, rates, _ = slora_panels(rows)
    assert served.title == "S1, S2: requests"
    assert [(line.label, len(line.points)) for line in rates.lines] == [
        ("S1, saturated, 2,000 registered", 2), ("S2, saturated, 1,000 registered", 1),
        ("S1, saturated, 10,000 registered", 1),
    ]  # fmt: skip
    papers = [line for line in served.lines if line.dashed]
    assert [(line.label[:8], len(line.points)) for line in papers] == [
        ("paper S1", 2), ("paper S2", 1),
    ]  # fmt: skip


def test_punica_has_a_line_for_each_batch_and_names_in_order() -> None:
    rows: list[Row] = [
        {"batch": b, "popularity": p, "new_tokens_per_s": 4e3, "of_identical": 0.9,
         "paper_tokens_per_s": 1044.0 if b == 32 else None}
        for b in (32, 64) for p in ("identical", "distinct")
    ]  # fmt: skip
    rates, shares = punica_panels(rows)
    assert [line.label for line in rates.lines] == [
        "batch 32", "batch 64", "paper (A100 80GB, batch 32)",
    ]  # fmt: skip
    assert [text for _, text in shares.x_ticks] == ["identical", "distinct"]
    assert len(shares.lines) == 2


def test_tiers_keeps_first_tokens_and_gaps_apart() -> None:
    rows: list[Row] = [
        {"part": "ttft", "case": "host", "ttft_ms_p50": 20.0, "ttft_ms_p99": 22.0},
        {"part": "inter_token", "case": "quiet", "inter_token_ms_p50": 8.0,
         "inter_token_ms_p99": 9.0},
    ]  # fmt: skip
    firsts, gaps = tiers_panels(rows)
    assert [text for _, text in firsts.x_ticks] == ["host"]
    assert [line.points for line in gaps.lines] == [[(0.0, 8.0)], [(0.0, 9.0)]]
