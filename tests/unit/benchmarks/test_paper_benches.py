"""The scripts under benchmarks/papers without an engine: their flags, traces and figures."""

import re
from types import ModuleType

import numpy as np
import pytest

from loraplex.entrypoints.bench.measure import Timeline
from loraplex.entrypoints.bench.names import MODELS
from loraplex.entrypoints.cli import flags

import published_figures
import punica
import slora
import tier_waves
import tiers

SHARED = {
    "--log-level",
    "--lora-modules",
    "--out",
    "--plot",
    "--ranks",
    "--repeats",
    "--weight-files",
}
OWN = {
    slora: {
        "--alpha", "--cv", "--duration", "--lengths", "--num-adapters", "--num-registered",
        "--num-requests", "--rates", "--setting", "--ttft-objective",
    },
    punica: {"--batches", "--num-requests", "--popularity"},
    tiers: {
        "--answer-len", "--batch", "--load-rate", "--probe-rate", "--prompt-len", "--samples",
    },
}  # fmt: skip


def flags_in(help_text: str) -> set[str]:
    return set(re.findall(r"--[a-z-]+[a-z]", help_text))


@pytest.mark.parametrize("script", OWN, ids=lambda module: module.__name__)
def test_help_lists_the_flags_of_the_engine_and_of_the_script(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # argparse would break a line inside a flag
    engine = flags.FlagParser()
    flags.add_engine_flags(engine, offline=True)
    with pytest.raises(SystemExit) as caught:
        script.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert script.DESCRIPTION in text
    assert flags_in(text) == flags_in(engine.format_help()) | SHARED | OWN[script]


def test_settings_are_the_papers() -> None:
    of_ranks = {setting for setting, _, _ in published_figures.SLORA_RANKS}
    assert published_figures.SETTINGS.keys() == published_figures.SLORA.keys() | of_ranks
    assert all(model in MODELS for model, _ in published_figures.SETTINGS.values())
    assert published_figures.SETTINGS["S4"] == ("llama-2-13b", (64, 32, 16))
    assert published_figures.PUNICA.keys() == published_figures.PUNICA_BASE.keys() <= MODELS.keys()
    for figures in published_figures.SLORA.values():
        rates = [figure.requests_per_s for _, figure in sorted(figures.items())]
        assert rates[0] == max(rates)
        assert all(0 < figure.attainment <= 1 for figure in figures.values())


def test_settings_of_several_gpus_have_the_papers_share_of_the_base() -> None:
    shares = {
        case: slora.paper_figures(*case)["paper_of_base"] for case in published_figures.SLORA_RANKS
    }
    assert (min(shares.values()), max(shares.values())) == (0.3667, 0.6464)  # "37 to 65 %"
    assert shares["S6", 10, 4] == 0.5231
    assert slora.paper_figures("S6", 100, 4) == {}
    assert slora.paper_figures("S1", 100, 1)["paper_requests_per_s"] == 7.99


def test_punica_lengths() -> None:
    trace = punica.punica_trace(20000, "distinct")
    answers = [r.num_new_tokens for r in trace]
    assert np.mean(answers) == pytest.approx(101, rel=0.05)  # 1,000 requests: about 101k tokens
    prompts = [r.num_prompt_tokens for r in trace]
    assert np.median(prompts) == pytest.approx(17, abs=1)
    assert min(prompts) >= 1 and min(answers) >= 1
    assert max(p + a for p, a in zip(prompts, answers, strict=True)) <= 1024


@pytest.mark.parametrize(
    ("popularity", "num_adapters"),
    [("distinct", 1024), ("uniform", 32), ("identical", 1), (None, 0)],
)
def test_punica_popularities(popularity: str | None, num_adapters: int) -> None:
    trace = punica.punica_trace(1024, popularity)
    assert len({r.adapter for r in trace} - {None}) == num_adapters
    lengths = [(r.num_prompt_tokens, r.num_new_tokens) for r in trace]
    assert lengths == [(r.num_prompt_tokens, r.num_new_tokens)
                       for r in punica.punica_trace(1024, "skewed")]  # fmt: skip


def test_no_adapter_of_the_tour_is_resident_at_its_turn() -> None:
    numbers = tier_waves.Numbers(64, num_new=7)
    spans = (numbers.batch, numbers.warm, numbers.tour, numbers.disk, numbers.new)
    assert [n for span in spans for n in span] == list(range(numbers.num_adapters))
    spare = numbers.num_slots - len(numbers.batch)
    assert len(numbers.warm) + len(tier_waves.TIERS) <= spare < len(numbers.tour)


def test_gaps_of_a_wave_are_those_of_its_batch() -> None:
    batch = [
        Timeline(0.0, arrivals=[(1.0, 1), (1.5, 2), (2.5, 3), (3.0, 4)]),
        Timeline(0.0, arrivals=[(1.2, 1), (2.0, 2), (2.8, 3)]),
    ]
    wave = tier_waves.Wave(batch, [], num_loads=0)
    assert (wave.window.start_s, wave.window.end_s) == (1.2, 2.8)
    assert wave.gaps_s(wave.window) == pytest.approx([1.0, 0.8, 0.8])
    inner = wave.window.inner
    assert 1.2 < inner.start_s < inner.end_s < 2.8
