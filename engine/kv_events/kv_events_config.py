"""The option kv_events_config: a JSON object with vLLM's names."""

import ipaddress

import msgspec

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ConfigError


class KVEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's KVEventsConfig.

    Attributes:
        publisher: "zmq" or "null"; None: zmq if events are enabled.
        endpoint: bound if it is ipc:// or holds "*" or "::"; else the address of a subscriber that
            has bound it.
        replay_endpoint: address at which subscribers ask for batches they have missed; None: none.
        buffer_steps: batches kept for them.
        hwm: batches kept for a subscriber that reads slowly; later ones are lost to it.
        max_queue_size: has no effect, since batches are sent at once.
        topic: first frame of each message.
    """

    enable_kv_cache_events: bool = False
    publisher: str | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""

    @property
    def is_enabled(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"


def kv_events_config(config: ServerConfig) -> KVEventsConfig:
    """Returns the option as values.

    Raises:
        ConfigError: it is not such an object, or would show prompts to other machines.
    """
    try:
        found = msgspec.json.decode(config.kv_events_config or "{}", type=KVEventsConfig)
    except msgspec.DecodeError as error:
        example = '{"enable_kv_cache_events": true, "endpoint": "ipc:///run/kv-events"}'
        raise ConfigError(f"kv_events_config: {error}; an example: {example}") from None
    if found.publisher not in (None, "zmq", "null"):
        raise ConfigError(
            f'kv_events_config: publisher must be "zmq" or "null", got {found.publisher!r}'
        )
    if found.buffer_steps < 0 or found.hwm < 0:
        raise ConfigError("kv_events_config: buffer_steps and hwm must not be negative")
    if found.is_enabled and not config.insecure:
        for endpoint in (found.endpoint, found.replay_endpoint or ""):
            if endpoint.startswith("tcp://") and not _is_loopback(endpoint):
                raise ConfigError(
                    f"kv_events_config: events hold the tokens of prompts, and {endpoint} shows "
                    "them to other machines without encryption: use ipc://PATH or "
                    "tcp://127.0.0.1:PORT, or pass --insecure"
                )
    return found


def check_shared_kv_events(config: ServerConfig) -> None:
    """Raises ConfigError if several engines cannot publish events with this option."""
    found = kv_events_config(config)
    if found.is_enabled and (binds(found.endpoint) or found.replay_endpoint):
        raise ConfigError(
            "kv_events_config: the engines of a cluster cannot all bind one address: give the "
            "endpoint of a subscriber that has bound it, as tcp://127.0.0.1:5557, and no "
            "replay_endpoint"
        )


def binds(endpoint: str) -> bool:
    """Tells whether vLLM binds such an endpoint; else it connects to it."""
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))


def _is_loopback(endpoint: str) -> bool:
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
