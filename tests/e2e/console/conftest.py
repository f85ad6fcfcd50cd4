"""One engine and one headless Chromium for the tests of the console."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from loraplex.engine.processes.engine import Engine

from helpers.running.http_server import Served, http_config, make_models

TIMEOUT_MS = 60_000  # only a test that hangs gets there


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("console")
    make_models(root)
    with Engine(http_config(root)) as engine:
        engine.start()
        yield Served(engine, root)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser. While it is open asyncio.run() fails in this process, so it ends with its file."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page, which must log no problem: neither a fault of a script nor a broken policy."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    problems: list[str] = []

    def on_console(message: Any) -> None:
        is_answer = message.text.startswith("Failed to load resource")  # an error that is shown
        if message.type == "error" and not is_answer:
            problems.append(message.text)

    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    yield page
    context.close()
    assert problems == []
