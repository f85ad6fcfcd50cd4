"""Clients of a router get equal answers whether an engine dies under them or not."""

from functools import partial
from typing import Any

import msgpack
import pytest

from loraplex.engine.frontend.clients import ClientTable
from loraplex.engine.frontend.frontend import Frontend
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.ipc.channel import Wakeup

from helpers.fakes.fake_engine import fake_config
from helpers.fakes.frontend_harness import make_codec
from helpers.running.routed_engines import RoutedEngines

CLIENT = b"client"
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return make_codec(tmp_path_factory.mktemp("tokenizer"))


class RoutedFrontend:
    """A frontend over two engines; `answers` joins what a client gets for each request."""

    def __init__(self, codec: TextCodec) -> None:
        self.cluster = RoutedEngines(2, placement="least_loaded")
        self.cluster.turn()
        info = next(iter(self.cluster.engines.values())).info
        config = fake_config()
        self.answers: dict[str, dict[str, Any]] = {}
        self.frontend = Frontend(
            config,
            name="router 0",
            info=info,
            codec=codec,
            scheduler=self.cluster.channel,
            clients_of=partial(ClientTable, self._reply, max_unread=1000),
            wakeup=Wakeup(),
        )

    def _reply(self, client: bytes, data: bytes) -> None:
        reply = msgpack.unpackb(data)
        answer = self.answers.setdefault(reply["request_id"], {"outputs": {}})
        assert "usage" not in answer, "a reply after the end"
        for entry in reply.pop("outputs"):
            joined = answer["outputs"].setdefault(
                entry["index"], {"text": "", "token_ids": [], "logprobs": []}
            )
            joined["text"] += entry["text"]
            joined["token_ids"] += entry["token_ids"]
            joined["logprobs"] += entry.get("logprobs", [])
            joined |= {key: entry[key] for key in ("finish_reason", "stop_reason")}
        reply.pop("times", None)  # differ in each run
        answer |= reply

    def serve(self, requests: dict[str, dict[str, Any]], *, kill_at: int = 0) -> dict[str, Any]:
        """Ask all at once; an engine dies at that turn. Returns the answers."""
        for request_id, values in requests.items():
            self.frontend.on_message(
                CLIENT, {"type": "generate", "request_id": request_id} | values
            )
        for turn in range(1000):
            if turn == kill_at - 1:
                self.cluster.kill(self.cluster.channel.engine_ids[0])
            self.cluster.now += 0.05
            for engine_id in self.cluster.channel.engine_ids:
                self.cluster.engines[engine_id].turn()
            for _, message in self.cluster.channel.receive():
                self.frontend.on_scheduler(message)
            self.frontend.run_ready()
            if all("usage" in self.answers.get(name, {}) for name in requests):
                return self.answers
        raise AssertionError("requests did not end")


def sampling(**values: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True} | values


def requests(stop: str) -> dict[str, dict[str, Any]]:
    prompt = {"prompt_token_ids": [5, 6, 7, 8]}
    return {
        "plain": {"prompt": "hello there", "sampling_params": sampling()},
        "stop": prompt | {"sampling_params": sampling(stop=[stop])},
        "kept stop": prompt
        | {"sampling_params": sampling(stop=[stop], include_stop_str_in_output=True)},
        "n": prompt | {"sampling_params": sampling(n=3, stop=[stop], min_tokens=2)},
        "logprobs": prompt | {"sampling_params": sampling(logprobs=0, prompt_logprobs=0)},
        "at once": prompt | {"sampling_params": sampling(), "stream": False},
        "long": {
            "prompt_token_ids": list(range(5, 300)),
            "sampling_params": sampling(prompt_logprobs=0),
            "return_prompt_token_ids": True,
        },
    }


def test_answers_are_equal_when_an_engine_dies_at_any_time(codec: TextCodec) -> None:
    prompt = {"prompt_token_ids": [5, 6, 7, 8]}
    free = RoutedFrontend(codec).serve({"free": prompt | {"sampling_params": sampling()}})
    text = free["free"]["outputs"][0]["text"]
    stop = text[len(text) // 2 :][:5]
    whole = RoutedFrontend(codec).serve(requests(stop))
    assert whole["stop"]["outputs"][0]["stop_reason"] == stop
    num_moves = 0
    for kill_at in range(1, 20, 2):
        routed = RoutedFrontend(codec)
        cut = routed.serve(requests(stop), kill_at=kill_at)
        num_moves += routed.cluster.channel.book.num_moves
        for name, expected in whole.items():
            assert cut[name] == expected, (name, kill_at)
    assert num_moves > 10
