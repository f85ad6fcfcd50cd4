"""The waves of the tiers benchmark: a batch that decodes, and short requests beside it."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.measure import Timeline, check_complete
from loraplex.entrypoints.bench.session import BenchSession
from loraplex.entrypoints.bench.traces import TraceRequest

NUM_WARM = 8  # adapters of probes that find theirs resident
NUM_SPARE_SLOTS = 16  # adapter slots besides the batch's; NUM_WARM adapters stay in them
NUM_TOUR = 3 * NUM_SPARE_SLOTS  # adapters that take turns, so many that each was evicted again
NUM_DISK = 32
TIERS = ("resident", "host", "disk", "new")
CASES = ("quiet", "warm", "loads")
_PROBE_TOKENS = 4
_EDGE = 0.15  # share of a window that is left out at either end
_MAX_WAVES = 40


class Numbers:
    """Ranges of adapter numbers by use: the batch, warm, tour, disk, then new ones."""

    def __init__(self, batch: int, num_new: int) -> None:
        bounds = np.cumsum([0, batch, NUM_WARM, NUM_TOUR, NUM_DISK, num_new]).tolist()
        spans = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        self.batch, self.warm, self.tour, self.disk, self.new = spans
        self.num_adapters = bounds[-1]
        self.num_slots = batch + NUM_SPARE_SLOTS


@dataclass
class Window:
    """Part of a wave in which the whole batch decodes, in seconds from the wave's start."""

    start_s: float
    end_s: float

    @property
    def inner(self) -> "Window":
        edge = _EDGE * (self.end_s - self.start_s)
        return Window(self.start_s + edge, self.end_s - edge)


@dataclass
class Wave:
    """Measurements of one wave."""

    batch: Sequence[Timeline]
    probes: Sequence[tuple[TraceRequest, Timeline]]
    num_loads: int

    @property
    def window(self) -> Window:
        return Window(
            max(timeline.arrivals[0][0] for timeline in self.batch),
            min(timeline.arrivals[-1][0] for timeline in self.batch),
        )

    def gaps_s(self, window: Window) -> list[float]:
        return [gap for t in self.batch for gap in t.gaps_s(window.start_s, window.end_s)]


@dataclass
class TierWaves:
    """Runs the waves over one engine."""

    args: argparse.Namespace
    session: BenchSession
    numbers: Numbers
    num_toured: int = 0
    new_left: list[int] = field(default_factory=list)

    def warm_up(self) -> Window:
        """Compile, and load all adapters but the new ones; returns how long a batch decodes."""
        numbers = self.numbers
        read = [*numbers.batch, *numbers.warm, *numbers.tour, *numbers.disk]
        self.new_left = list(numbers.new)
        self.session.warm_up([self._probe(number) for number in read])
        self.wave([], "warm-up")
        return self.wave([], "warm-up").window

    def wave(self, probes: Sequence[TraceRequest], title: str) -> Wave:
        """Run the batch with probes beside it.

        The batch's and the warm adapters are made resident before, so that only probes load.
        """
        session, numbers, args = self.session, self.numbers, self.args
        resident = [self._probe(number) for number in (*numbers.batch, *numbers.warm)]
        session.measure(resident, title=title)
        batch = [TraceRequest(n, args.prompt_len, args.answer_len) for n in numbers.batch]
        trace = [*batch, *probes]
        before = session.counters()
        timelines = session.measure(trace, title=title)
        check_complete(timelines, trace)
        num_loads = session.counters()["num_adapter_loads"] - before["num_adapter_loads"]
        beside = list(zip(probes, timelines[len(batch) :], strict=True))
        return Wave(timelines[: len(batch)], beside, num_loads)

    def first_tokens(self, window: Window) -> dict[str, list[float]]:
        """Seconds to the first token of probes in each tier, while the whole batch decoded."""
        num_probes = math.floor((window.end_s - window.start_s) * self.args.probe_rate)
        num_probes = min(num_probes, len(TIERS) * NUM_DISK) // len(TIERS) * len(TIERS)
        if num_probes == 0:
            raise ConfigError(
                f"the batch decodes for {window.end_s - window.start_s:.2f} s, too short for a "
                "probe in each tier: raise --answer-len or --probe-rate"
            )
        found: dict[str, list[float]] = {tier: [] for tier in TIERS}
        for _ in range(_MAX_WAVES):
            if min(map(len, found.values())) >= self.args.samples:
                break
            if len(self.new_left) < num_probes // len(TIERS):
                break
            tier_of, probes = self._tier_probes(window, num_probes)
            wave = self.wave(probes, "first tokens")
            self._check_loads(wave, num_cold=num_probes - num_probes // len(TIERS))
            decoding = wave.window
            for probe, timeline in wave.probes:
                is_inside = decoding.start_s <= probe.arrival_s
                if is_inside and timeline.arrivals[0][0] <= decoding.end_s:
                    found[tier_of[probe.adapter]].append(timeline.ttft_s)
        return found

    def case_wave(self, case: str, window: Window) -> tuple[list[float], float]:
        """Seconds between the batch's tokens while probes arrive, and loads a second."""
        seconds = window.end_s - window.start_s
        num_probes = 0 if case == "quiet" else max(1, math.floor(seconds * self.args.load_rate))
        warm = [self.numbers.warm[i % NUM_WARM] for i in range(num_probes)]
        adapters = self._take_tour(num_probes) if case == "loads" else warm
        probes = self._spread(adapters, window, self.args.load_rate)
        wave = self.wave(probes, case)
        self._check_loads(wave, num_cold=num_probes if case == "loads" else 0)
        decoding = wave.window
        measured = Window(max(window.start_s, decoding.start_s), min(window.end_s, decoding.end_s))
        return wave.gaps_s(measured), wave.num_loads / seconds

    def _tier_probes(
        self, window: Window, num_probes: int
    ) -> tuple[dict[int | None, str], list[TraceRequest]]:
        """Tier of each probe's adapter, and the probes, one of each tier in turn."""
        count = num_probes // len(TIERS)
        disk = self.numbers.disk[:count]
        for number in disk:
            name, path = self.session.adapters[number]
            self.session.engine.client.unload_adapter(name)
            self.session.engine.client.load_adapter(name, path, lazy=True)
        new, self.new_left = self.new_left[:count], self.new_left[count:]
        by_tier = ([self.numbers.warm[0]] * count, self._take_tour(count), disk, new)
        adapters = [number for turn in zip(*by_tier, strict=True) for number in turn]
        tier_of: dict[int | None, str] = {
            number: tier for tier, numbers in zip(TIERS, by_tier, strict=True) for number in numbers
        }
        return tier_of, self._spread(adapters, window, self.args.probe_rate)

    def _take_tour(self, count: int) -> list[int]:
        start, self.num_toured = self.num_toured, self.num_toured + count
        return [self.numbers.tour[i % NUM_TOUR] for i in range(start, start + count)]

    def _spread(self, adapters: Sequence[int], window: Window, rate: float) -> list[TraceRequest]:
        return [
            replace(self._probe(number), arrival_s=window.start_s + index / rate)
            for index, number in enumerate(adapters)
        ]

    def _probe(self, number: int) -> TraceRequest:
        return TraceRequest(number, self.args.prompt_len, _PROBE_TOKENS)

    def _check_loads(self, wave: Wave, *, num_cold: int) -> None:
        if wave.num_loads != num_cold:
            print(
                f"note: {wave.num_loads} adapters were loaded, but {num_cold} probes name one "
                "outside the pages: these numbers mix the tiers",
                file=sys.stderr,
            )
