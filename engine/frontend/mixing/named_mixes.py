"""The mixes that the configuration gives a name."""

from collections.abc import Collection

from loraplex.engine.adapters.paths import ADAPTER_NAME, adapters_at_start
from loraplex.engine.config import AdapterConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.frontend.mixing.adapter_use import AdapterUse, adapter_uses

NamedMixes = dict[str, tuple[AdapterUse, ...]]


def named_mixes(config: AdapterConfig, adapters: Collection[str] = ()) -> NamedMixes:
    """Returns the parts of each mix by its name; `adapters` are names that no mix may have.

    Raises:
        ConfigError: a mix is malformed, or has the name of an adapter or of another mix.
    """
    mixes: NamedMixes = {}
    for name, text in config.adapter_mixes:
        if not ADAPTER_NAME.fullmatch(name):
            raise ConfigError(f"adapter_mix {name!r} is no name; names are those of adapters")
        if name in adapters or name in mixes:
            raise ConfigError(f"adapter_mix {name!r} has the name of an adapter or another mix")
        try:
            mixes[name] = adapter_uses([_entry(part) for part in text.split(",")])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"adapter_mix {name}={text}: {error}") from None
    return mixes


def check_adapter_config(config: AdapterConfig) -> None:
    """Raises ConfigError as by adapters_at_start() and named_mixes()."""
    named_mixes(config, {name for name, _ in adapters_at_start(config)})


def _entry(text: str) -> dict[str, object]:
    """Returns a name and a weight: the number after the last colon, 1 if there is none."""
    name, colon, weight = text.strip().rpartition(":")
    try:
        return {"name": name, "weight": float(weight)} if colon else {"name": weight}
    except ValueError:
        return {"name": text.strip()}
