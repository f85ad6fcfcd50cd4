"""Models and adapters over HTTP: lists, loads and pins, in the shapes of vLLM and SGLang."""

from typing import Any

import httpx
import openai
import pytest

from helpers.running.http_server import ADAPTERS, BASE, MIX, Served

pytestmark = pytest.mark.e2e


@pytest.fixture
def http(served: Served) -> httpx.Client:
    return httpx.Client(base_url=served.url, timeout=60)


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    assert error["code"] == response.status_code
    return response.status_code, error["type"], error["message"]


def test_models_are_the_base_and_its_adapters(served: Served, api: openai.OpenAI) -> None:
    models = {model.id: model.model_dump() for model in api.models.list()}
    assert list(models) == [BASE, *ADAPTERS, MIX]
    assert models[BASE]["root"] == str(served.root / "base")
    assert models[BASE]["parent"] is None and models[BASE]["max_model_len"] == 512
    for name in ADAPTERS:
        assert models[name]["root"] == str(served.root / name)
        assert models[name]["parent"] == BASE
    assert api.models.retrieve("a").id == api.models.retrieve(f"{BASE}:a").id == "a"
    assert api.models.retrieve(BASE).id == BASE
    for name in ("nobody", "not a name", f"{BASE}:nobody"):
        with pytest.raises(openai.NotFoundError, match=f"The model `{name}` does not exist"):
            api.models.retrieve(name)


def test_an_adapter_is_loaded_used_and_unloaded_as_in_vllm(
    served: Served, api: openai.OpenAI, http: httpx.Client
) -> None:
    load = {"lora_name": "new", "lora_path": str(served.root / "spare")}
    response = http.post("/v1/load_lora_adapter", json=load)
    assert (response.status_code, response.text) == (
        200, "Success: LoRA adapter 'new' added successfully."
    )  # fmt: skip
    again = http.post("/v1/load_lora_adapter", json=load)
    assert error_of(again) == (
        400, "InvalidUserInput",
        "The lora adapter 'new' has already been loaded. If you want to load the adapter in "
        "place, set 'load_inplace' to True.",
    )  # fmt: skip
    assert api.completions.create(model="new", prompt="x", max_tokens=2).model == "new"
    inplace = {**load, "lora_path": str(served.root / "b"), "load_inplace": True}
    assert http.post("/v1/load_lora_adapter", json=inplace).status_code == 200
    assert api.models.retrieve("new").model_dump()["root"] == str(served.root / "b")
    gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
    assert (gone.status_code, gone.text) == (
        200, "Success: LoRA adapter 'new' removed successfully."
    )  # fmt: skip
    assert error_of(http.post("/v1/unload_lora_adapter", json={"lora_name": "new"})) == (
        404, "NotFoundError", "The lora adapter 'new' cannot be found."
    )  # fmt: skip
    with pytest.raises(openai.NotFoundError, match="The model `new` does not exist"):
        api.completions.create(model="new", prompt="x")


@pytest.mark.parametrize(
    ("path", "body", "want"),
    [
        ("load", {"lora_name": "x"}, (400, "Both 'lora_name' and 'lora_path' must be provided.")),
        ("unload", {}, (400, "'lora_name' needs to be provided to unload a LoRA adapter.")),
        ("load", {"lora_name": "x", "lora_path": "/etc"}, (403, "lies outside")),
        ("load", {"lora_name": "x", "lora_path": "base"}, (400, "adapter_config.json")),
        ("load", {"lora_name": "x", "lora_path": "missing"}, (400, "no directory")),
        ("load", {"lora_name": "bad name", "lora_path": "spare"}, (400, "not an adapter name")),
    ],
)
def test_refused_loads(
    path: str, body: dict[str, Any], want: tuple[int, str], http: httpx.Client
) -> None:
    status, _, text = error_of(http.post(f"/v1/{path}_lora_adapter", json=body))
    assert status == want[0] and want[1] in text
    assert http.get("/v1/lora_adapters/x").status_code == 404


def test_sglangs_names_for_loads(served: Served, http: httpx.Client) -> None:
    load = {"lora_name": "s", "lora_path": str(served.root / "spare"), "pinned": True}
    response = http.post("/load_lora_adapter", json=load)
    assert response.status_code == 200 and response.json()["success"] is True
    assert response.json()["loaded_adapters"]["s"] == load["lora_path"]
    assert http.get("/v1/lora_adapters/s").json()["pinned"] is True
    again = http.post("/load_lora_adapter", json=load)
    assert again.status_code == 400 and again.json()["success"] is False
    assert "already" in again.json()["error_message"]
    response = http.post("/unload_lora_adapter", json={"lora_name": "s"})
    assert response.json()["success"] is True and "s" not in response.json()["loaded_adapters"]
    assert http.post("/unload_lora_adapter", json={"lora_name": "s"}).status_code == 400


def test_pins_and_the_list_of_adapters(
    api: openai.OpenAI, http: httpx.Client, served: Served
) -> None:
    assert http.post("/v1/pin_lora_adapter", json={"lora_name": "a"}).json()["pinned"] is True
    api.completions.create(model="a", prompt="x", max_tokens=2)
    rows = {row["name"]: row for row in http.get("/v1/lora_adapters").json()["data"]}
    assert rows["a"]["pinned"] is True and rows["a"]["tier"] == "pages"
    assert rows["a"]["usage"]["num_requests"] >= 1
    with served.zmq() as client:
        assert [adapter["name"] for adapter in client.list_adapters()] == list(rows)
    unpinned = http.post("/v1/unpin_lora_adapter", json={"lora_name": "a"})
    assert unpinned.json()["pinned"] is False
    assert http.post("/v1/pin_lora_adapter", json={"lora_name": "zz"}).status_code == 404
    assert http.get("/v1/lora_adapters/zz").status_code == 404
