"""The live view in a real browser: what is drawn is what the engine says."""

import http.client
import json
from typing import Any

import httpx
import pytest

from loraplex import SamplingParams

from helpers.browser.browser_waits import wait_until
from helpers.running.http_server import Served

pytestmark = pytest.mark.e2e

COUNT_PIXELS = """color => {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = color;
  probe.fillRect(0, 0, 1, 1);
  const wanted = probe.getImageData(0, 0, 1, 1).data;
  const canvas = document.querySelector(".pool canvas");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i] == wanted[0] && data[i + 1] == wanted[1] && data[i + 2] == wanted[2]) count++;
  }
  return count;
}"""
SWATCH = """name => {
  const link = [...document.querySelectorAll("#adapters a")].find(a => a.textContent == name);
  return getComputedStyle(link.parentElement.querySelector(".swatch")).backgroundColor;
}"""
WATCH_STATE = """() => {
  window.states = [];
  const state = document.getElementById("live-state");
  new MutationObserver(() => states.push(state.textContent)).observe(state, { childList: true });
}"""
KV = "getComputedStyle(document.querySelector('.swatch.kv')).backgroundColor"


def open_live(page: Any, served: Served) -> None:
    page.goto(f"{served.url}/#live")
    page.wait_for_selector("#adapters tbody tr")


def tier(page: Any, name: str) -> str:
    row = page.locator("#adapters tbody tr", has=page.get_by_text(name, exact=True))
    return str(row.locator(".tier").inner_text())


def test_the_pool_changes_when_an_adapter_loads(served: Served, page: Any) -> None:
    with served.zmq() as client:
        (former,) = client.list_adapters("b")
        if former["tier"] == "pages":  # another test has used it
            client.unload_adapter("b")
            client.load_adapter("b", "b", lazy=True)
        open_live(page, served)
        assert tier(page, "b") == "disk"
        before = page.inner_text("#pages-adapter")
        list(client.generate("Hello", SamplingParams(max_tokens=2), adapter="b"))
        wait_until(
            page,
            "[...document.querySelectorAll('#adapters tr')].some("
            "row => row.textContent.startsWith('b') && row.querySelector('.tier.pages'))",
        )
        (row,) = client.list_adapters("b")
    assert page.inner_text("#pages-adapter") != before
    num_cells = page.evaluate(COUNT_PIXELS, page.evaluate(SWATCH, "b"))
    edge = 14  # of a cell at this size of the window
    assert num_cells == row["num_pages"] * edge * edge
    assert page.inner_text("#resident").startswith("1" if before == "0" else "2")


def test_each_cell_says_what_it_is(served: Served, page: Any) -> None:
    with served.zmq() as client:
        list(client.generate("Hello", SamplingParams(max_tokens=2), adapter="a"))
    open_live(page, served)
    wait_until(page, "document.querySelector('.tier.pages')")
    page.focus(".pool canvas")
    seen = set()
    for key in ["ArrowRight"] * 60 + ["ArrowDown", "ArrowLeft"]:
        page.keyboard.press(key)
        seen.add(page.inner_text("#cell").split(": ", 1)[1].split(" (")[0])
    assert "adapter a" in seen and seen <= {
        "adapter a",
        "adapter b",
        "free",
        "KV cache in use",
        "prefix cache, idle",
    }


def test_running_requests_are_drawn_and_counted(served: Served, page: Any) -> None:
    open_live(page, served)
    with served.zmq() as client:
        stream = client.generate(
            [5, 6, 7] * 40, SamplingParams(max_tokens=380, ignore_eos=True, temperature=1)
        )
        next(stream)
        wait_until(page, "document.getElementById('running').textContent.startsWith('1')")
        wait_until(page, "Number(document.getElementById('tokens-rate').textContent) > 0")
        assert page.evaluate(COUNT_PIXELS, page.evaluate(KV)) > 0
        stream.close()
        wait_until(page, "document.getElementById('running').textContent.startsWith('0')")
    assert page.evaluate(COUNT_PIXELS, page.evaluate(KV)) == 0
    assert "ms" in page.inner_text("#first-token")


def test_an_engine_that_does_not_answer_is_noticed(served: Served, page: Any) -> None:
    page.clock.install()
    open_live(page, served)
    page.evaluate(WATCH_STATE)
    page.clock.fast_forward(10_000)
    wait_until(page, "states.some(text => /has not answered for \\d+ s/.test(text))")
    wait_until(page, "document.getElementById('live-state').textContent.startsWith('Live')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_narrow_and_wide_windows(served: Served, page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    for width in (360, 800, 1600):
        page.set_viewport_size({"width": width, "height": 800})
        for view in ("chat", "live"):
            page.goto(f"{served.url}/#{view}")
            page.wait_for_selector(f"#{view}:visible")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                view,
                width,
            )


def test_names_in_the_live_view_are_never_html(served: Served, page: Any) -> None:
    with httpx.stream("GET", f"{served.url}/loraplex/live") as response:
        line = next(line for line in response.iter_lines() if line.startswith("data: "))
    view = json.loads(line.removeprefix("data: "))
    name = "<img src=x onerror=alert(1)>"
    view["adapters"][0] |= {"name": name, "error": name, "tier": name, "content_hash": "h"}
    page.route(
        "**/loraplex/live",
        lambda route: route.fulfill(
            body=f"data: {json.dumps(view)}\n\n", content_type="text/event-stream"
        ),
    )
    open_live(page, served)
    assert name in page.locator("#adapters a").all_inner_texts()
    assert page.locator("main img, main script").count() == 0


def test_the_page_brings_its_policy_and_asks_no_other_server(served: Served, page: Any) -> None:
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    response = page.goto(f"{served.url}/#live")
    page.wait_for_selector("#adapters tbody tr")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert all(url.startswith(served.url) for url in urls) and len(urls) > 10


def test_only_files_of_the_console_are_served(served: Served) -> None:
    host = served.engine.http_endpoint
    connection = http.client.HTTPConnection(host)
    for path in ("/console/..%2fapp.py", "/console/../app.py", "/console/none.js", "/console/"):
        connection.request("GET", path)
        response = connection.getresponse()
        assert (response.status, b"message" in response.read()) == (404, True), path
    connection.close()
