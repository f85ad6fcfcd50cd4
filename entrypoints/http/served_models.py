"""The names under which the base model and the adapters are served."""

from loraplex.engine.adapters.paths import ADAPTER_NAME
from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.http.errors import HttpError, unknown_model

PACKAGED_MODEL = "SmolLM2-135M-Instruct"


class ServedModels:
    """Resolves the `model` of a request.

    Attributes:
        base: the base model's name.
        root: the base model's path, or its name if it is the packaged one.
        mixes: text of each mix that the configuration names.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.root = config.model.model or PACKAGED_MODEL
        self.base = config.server.served_model_name or self.root
        self.mixes = dict(config.adapter.adapter_mixes)

    def adapter_of(self, model: str | None) -> str:
        """Returns the adapter that a model's name means, "" for the base model.

        `model` is the base model's name, an adapter's, "base:adapter", or empty for the base model.

        Raises:
            HttpError: no model can have this name (status 404).
        """
        if not model or model == self.base:
            return ""
        name = model.removeprefix(f"{self.base}:")
        if not ADAPTER_NAME.fullmatch(name):
            raise unknown_model(model[:200])
        return name

    def adapter_for(self, model: str | None, lora_path: str | None) -> str:
        """Returns the adapter of a request that may name it in SGLang's field `lora_path` too.

        Raises:
            HttpError: no model can have this name (404), or two adapters are named (400).
        """
        adapter = self.adapter_of(model)
        if not lora_path:
            return adapter
        named = self.adapter_of(lora_path)
        if adapter and adapter != named:
            raise HttpError(
                400,
                f"model names the adapter {adapter!r} and lora_path {lora_path[:200]!r}: leave "
                "one out",
                param="lora_path",
            )
        return named
