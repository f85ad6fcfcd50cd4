"""Mixes of adapters over HTTP: as a field of a body, and under a name of the configuration."""

import httpx
import openai
import pytest

from loraplex import LoRAMix, SamplingParams

from helpers.running.http_server import BASE, MIX, Served

pytestmark = pytest.mark.e2e

PARTS = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": -1.5}]


def test_a_mix_answers_alike_at_every_entrance(served: Served, api: openai.OpenAI) -> None:
    fields = {"prompt": "hello", "max_tokens": 8, "temperature": 0.0}
    extra = {"ignore_eos": True, "return_token_ids": True}
    mixed = api.completions.create(model=BASE, extra_body=extra | {"adapters": PARTS}, **fields)
    named = api.completions.create(model=MIX, extra_body=extra, **fields)
    base = api.completions.create(model=BASE, extra_body=extra, **fields)
    answers = [completion.choices[0].text for completion in (mixed, named, base)]
    assert answers[0] == answers[1] != answers[2]
    with served.zmq() as client:
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        mix = LoRAMix((part["name"], part["weight"]) for part in PARTS)
        *_, output = client.generate("hello", params, adapter=mix)
    assert output.outputs[0].text == answers[0]
    chat = api.chat.completions.create(
        model=MIX, messages=[{"role": "user", "content": "hello"}], max_tokens=4
    )
    assert chat.model == MIX


def test_a_named_mix_is_a_model(api: openai.OpenAI) -> None:
    assert MIX in [model.id for model in api.models.list()]
    card = api.models.retrieve(MIX).model_dump()
    assert (card["parent"], card["root"]) == (BASE, "a:0.5,b:-1.5")


def test_errors_name_the_adapter(served: Served) -> None:
    def error(**values: object) -> tuple[int, str]:
        body = {"model": BASE, "prompt": "x", "max_tokens": 1, **values}
        response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
        return response.status_code, response.json()["error"]["message"]

    status, text = error(adapters=[*PARTS, {"name": "nobody"}])
    assert status == 404 and "'nobody'" in text
    status, text = error(adapters=[{"name": "a", "weight": 0}])
    assert status == 400 and "not 0" in text
    status, text = error(model="a", adapters=PARTS)
    assert status == 400 and "not both" in text
