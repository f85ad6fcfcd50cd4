"""benchmarks/simulation/policies.py with a few requests a case."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import policies
from policies import Case

PAIR = (("heavy", 1.0), ("light", 0.5))
ONE = (("", 1.0),)


def small_cases() -> list[Case]:
    """A case for each line of the plot."""
    abort = [
        Case("abort", {"policy": name}, ONE, cv=cv, num_adapters=4)
        for name in ("fcfs", "abort") for cv in (1.0, 4.0)
    ]  # fmt: skip
    fair = [Case("fairness", {"policy": name}, PAIR) for name in ("fcfs", "vtc")]
    limits: list[dict[str, Any]] = [
        {"policy": "fcfs"},
        {"policy": "cluster", "max_adapters_per_batch": 32},
        {"policy": "cluster", "max_adapters_per_batch": 128},
    ]
    many = [Case("clustering", limit, ONE, num_adapters=8) for limit in limits]
    return [*abort, *fair, *many]


def test_rows_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policies, "cases", small_cases)
    monkeypatch.setattr(policies, "SECONDS", 6.0)
    out, plot = tmp_path / "out.jsonl", tmp_path / "plot.svg"
    policies.main(["--out", str(out), "--plot", str(plot)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question"] for row in rows] == [case.question for case in small_cases()]
    for row in rows:
        rate = sum(row["trace"]["tenants"].values())
        assert row["requests"] == rate * policies.SECONDS
        assert row["attainment"] == 1.0 and row["given_up"] == 0  # an idle engine is in time
        assert row["simulation"] == policies.NOTE
    assert all(row["service_gap"] <= row["bound"] for row in rows if row["question"] == "fairness")
    text = " ".join(ElementTree.parse(plot).getroot().itertext())
    for label in ("fcfs, cv 4", "VTC's bound", "cluster 128", policies.NOTE):
        assert label in text
    assert policies.NOTE in capsys.readouterr().out


def test_the_cases_of_a_run_have_different_set_ups() -> None:
    set_ups = [json.dumps(policies.describe(case)) for case in policies.cases()]
    assert len(set(set_ups)) == len(set_ups)


def test_a_plot_of_another_kind_is_refused_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        policies.main(["--plot", "x.jpg"])
    assert caught.value.code == 2
    assert ".svg or .png" in capsys.readouterr().err
