"""Thousands of random adapters on little disk, plots, and the papers' numbers beside ours."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from loraplex.engine.adapters.packing import AdapterTarget
from loraplex.engine.adapters.peft_files import read_adapter
from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench import dummy
from loraplex.entrypoints.bench.names import MODULES
from loraplex.entrypoints.bench.plots import plot
from loraplex.entrypoints.bench.results import Results, Table
from loraplex.memory.adapter_layout import ModuleShape

SVG = "{http://www.w3.org/2000/svg}"


def tiny_target() -> AdapterTarget:
    shapes = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64))
    return AdapterTarget(
        num_layers=2,
        shapes=tuple(ModuleShape(*shape) for shape in shapes),
        page_elems=16 * 2 * 32,
        dtype=torch.bfloat16,
        max_rank=16,
    )


@pytest.mark.parametrize(("ranks", "num_files"), [([4], 3), ([8, 4], 3), ([8, 4, 2], 1)])
def test_adapters_that_share_files_differ_in_content(
    tmp_path: Path, ranks: list[int], num_files: int
) -> None:
    writer = dummy.AdapterWriter(
        dummy.model_config("tiny"), ranks=ranks, modules=MODULES, num_weight_files=num_files
    )
    seen = set()
    written = 0
    for index in range(25):
        path = writer.write(tmp_path / f"a{index}", index)
        packed = read_adapter(f"a{index}", path, tiny_target())
        assert int(packed.rank.max()) == ranks[index % len(ranks)]
        assert float(packed.scale.max()) == pytest.approx(1.0, abs=0.01)
        seen.add(packed.content_hash)
        written += not (path / "adapter_model.safetensors").is_symlink()
        weights = (path / "adapter_model.safetensors").stat().st_size
        assert 0 < weights - writer.num_bytes(index) < 8192  # the rest is the header
    assert len(seen) == 25
    assert written == -(-num_files // len(ranks)) * len(ranks)


def test_ten_thousand_adapters_have_ten_thousand_scales(tmp_path: Path) -> None:
    writer = dummy.AdapterWriter(
        dummy.model_config("tiny"), ranks=[8], modules=["q"], num_weight_files=1
    )
    seen = set()
    for index in (0, 1, 2, 4095, 4096, 9999):
        path = writer.write(tmp_path / str(index), index)
        alpha = json.loads((path / "adapter_config.json").read_text())["lora_alpha"]
        seen.add(torch.tensor(alpha / 8, dtype=torch.float32).item())
    assert len(seen) == 6


ROWS: dict[str, list[dict[str, Any]]] = {
    "throughput": [
        {"num_adapters": n, "new_tokens_per_s": 90.0, "inter_token_ms_p50": 1.0,
         "inter_token_ms_p99": 3.0} for n in (0, 32)
    ],
    "latency": [
        {"batch": b, "popularity": p, "step_ms": 2.0, "new_tokens_per_s": 9.0}
        for p in ("base", "distinct") for b in (1, 64)
    ],
    "serve": [
        {"rate": r, "attainment": 0.5, "ttft_ms_p50": 5.0, "ttft_ms_p99": 70.0,
         "inter_token_ms_p50": 1.0, "inter_token_ms_p99": 3.0} for r in (1.0, 2.5)
    ],
    "slora": [
        {"setting": "S1", "load": load, "rate": rate, "num_adapters": n, "requests_per_s": 20.0,
         "new_tokens_per_s": 5e3, "ttft_ms_mean": 30.0, "paper_requests_per_s": 8.0}
        for load, rate in (("saturated", None), ("10/s, cv 1", 10.0)) for n in (2000, 5)
    ],
    "punica": [
        {"batch": b, "popularity": p, "new_tokens_per_s": 4e3, "of_identical": 0.9,
         "paper_tokens_per_s": 1044.0 if b == 32 else None}
        for b in (32, 64) for p in ("identical", "distinct")
    ],
    "tiers": [
        {"part": "ttft", "case": "host", "ttft_ms_p50": 20.0, "ttft_ms_p99": 22.0},
        {"part": "inter_token", "case": "quiet", "inter_token_ms_p50": 8.0,
         "inter_token_ms_p99": 9.0},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_plots(name: str) -> None:
    rows = [{"bench": name, "model": "tiny", "device": "a <GPU>", **row} for row in ROWS[name]]
    root = ElementTree.fromstring(plot(rows))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "tiny, a <GPU>" in texts
    assert len(list(root.iter(f"{SVG}polyline"))) >= 2
    for x in {str(row.get("num_adapters", row.get("popularity", "ms"))) for row in rows}:
        assert x in texts
    assert plot([{"bench": name, **dict.fromkeys(ROWS[name][0]), "setting": "S1"}]) == ""


def test_results_append_and_draw_their_own_rows(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for _ in range(2):
        results = Results(out)
        for row in ROWS["throughput"]:
            results.write({"bench": "throughput", **row})
    assert len(out.read_text().splitlines()) == 4
    root = ElementTree.parse(out.with_suffix(".svg")).getroot()
    assert all(len(line.attrib["points"].split()) == 2 for line in root.iter(f"{SVG}polyline"))
    Results(None).write({"bench": "throughput", **ROWS["throughput"][0]})
    with pytest.raises(ConfigError, match="no directory"):
        Results(tmp_path / "none" / "out.jsonl")


def test_table_shows_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(a=-3, b=8, c=3)
    table.add({"a": "x", "b": 1234.567, "c": None})
    assert capsys.readouterr().out == "a           b    c\nx    1,234.57    -\n"
