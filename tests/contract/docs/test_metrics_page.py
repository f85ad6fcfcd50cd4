"""docs/reference/metrics.md and the Grafana dashboard follow the definitions of the series."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

from loraplex.engine.stores.store_counts import StoreCounts

from helpers.scheduling.metric_scrapes import scraped, stats_of
from helpers.scheduling.scheduler_harness import Harness

ROOT = Path(__file__).parents[3]
CLUSTER_ONLY = {
    "loraplex_engines", "loraplex_lost_engines_total", "loraplex_router_moves_total",
    "loraplex_router_recomputed_tokens_total",
}  # fmt: skip


def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_page_is_up_to_date() -> None:
    generator = module("docs/generate_metrics.py")
    found = generator.PAGE.read_text(encoding="utf-8")
    assert found == generator.page(), f"the page is stale; regenerate it: {generator.COMMAND}"


def test_dashboard_is_up_to_date() -> None:
    generator = module("examples/grafana/generate_dashboard.py")
    found = generator.FILE.read_text(encoding="utf-8")
    assert found == generator.text(), f"the file is stale; regenerate it: {generator.COMMAND}"


def test_dashboard_names_only_series_of_a_scrape() -> None:
    harness = Harness()
    harness.register("a")
    harness.add("a", [1, 2, 3], adapter="a", max_tokens=4)
    harness.run()
    stores = {"stores": StoreCounts().snapshot(), "cache_bytes": 0}
    exist = {name for name, _ in scraped(stats_of(harness), **stores)} | CLUSTER_ONLY
    dashboard = json.loads((ROOT / "examples/grafana/dashboard.json").read_text(encoding="utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    texts = [target["expr"] for panel in panels for target in panel["targets"]]
    texts += [v["query"] for v in dashboard["templating"]["list"]]
    named = {name for text in texts for name in re.findall(r"(?:vllm:|loraplex_)\w+", text)}
    assert len(named) > 20
    assert named <= exist, sorted(named - exist)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places), "panels lie on each other"
