"""Pairs the prompts of an offline call with their parameters and adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.lora_mix import LoRA, LoRAMix
from loraplex.entrypoints.client.lora_request import LoRARequest


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of an offline call; the fields are arguments of Client.submit."""

    prompt: dict[str, Any]
    sampling_params: SamplingParams
    adapter: LoRA | None
    priority: int
    salt: str


def make_batch(
    prompts: Sequence[dict[str, Any]],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    lora_request: LoRA | Sequence[LoRA | None] | None,
    priority: int | Sequence[int] | None,
) -> list[BatchRequest]:
    """Pairs prompts with parameters; a single value goes to every prompt.

    Raises:
        ValueError: a list is not as long as the prompts, or one adapter name has two paths.
        TypeError: a prompt, a parameter or an adapter is of the wrong type.
    """
    num = len(prompts)
    params = _spread("sampling_params", sampling_params, SamplingParams, SamplingParams(), num)
    adapters = _spread("lora_request", lora_request, LoRA, None, num)
    priorities = _spread("priority", priority, int, 0, num)
    batch = []
    for prompt, own_params, adapter, own_priority in zip(
        prompts, params, adapters, priorities, strict=True
    ):
        salt = prompt.pop("cache_salt", "")
        if not isinstance(salt, str):
            raise TypeError(f"cache_salt must be a string, got {salt!r}")
        adapter = _with_absolute_path(adapter)
        batch.append(BatchRequest(prompt, own_params, adapter, own_priority, salt))
    _check_paths(batch)
    return batch


def _spread(name: str, value: Any, kind: Any, default: Any, num: int) -> list[Any]:
    """Returns a value for each of `num` prompts: a list as it is, or one value repeated.

    None stands for `default`.
    """
    if value is None or isinstance(value, kind):
        return [default if value is None else value] * num
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be {_name_of(kind)} or a list of them, got {value!r:.80}")
    if len(value) != num:
        raise ValueError(f"{num} prompts but {len(value)} entries in {name}")
    for entry in value:
        if entry is not None and not isinstance(entry, kind):
            raise TypeError(f"{name} must hold only {_name_of(kind)}, got {entry!r:.80}")
    return [default if entry is None else entry for entry in value]


def _name_of(kind: Any) -> str:
    """Returns the name of a class, or of the first in a union."""
    return str((get_args(kind) or (kind,))[0].__name__)


def _with_absolute_path(adapter: LoRA | None) -> LoRA | None:
    if isinstance(adapter, LoRAMix):
        return adapter.with_absolute_paths()
    return adapter and replace(adapter, lora_path=adapter.absolute_path)


def _parts(adapter: LoRA | None) -> list[LoRARequest]:
    if isinstance(adapter, LoRAMix):
        return [part for part, _ in adapter.parts]
    return [adapter] if adapter else []


def _check_paths(batch: Sequence[BatchRequest]) -> None:
    paths: dict[str, str] = {}
    for adapter in (part for request in batch for part in _parts(request.adapter)):
        if not adapter.lora_path:
            continue
        path = paths.setdefault(adapter.lora_name, adapter.lora_path)
        if path != adapter.lora_path:
            raise ValueError(
                f"adapter {adapter.lora_name!r} has two paths, {path} and {adapter.lora_path}: "
                "give each adapter a name of its own"
            )
