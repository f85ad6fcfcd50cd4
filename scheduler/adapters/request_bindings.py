"""Binds a request to its adapters: first to their versions, then to positions of its prompt."""

from loraplex.scheduler.adapters.binding import MAX_BINDINGS, Binding, last_occurrence
from loraplex.scheduler.adapters.registry import AdapterRegistry
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.request import Request, RequestRefused


def bind_versions(request: Request, registry: AdapterRegistry) -> None:
    """Bind a new request to what the names of its adapters mean now.

    Raises:
        RequestRefused: it names too many adapters, or as by AdapterRegistry.resolve.
    """
    if len(request.mix) > MAX_BINDINGS:
        raise RequestRefused(
            "bad_request",
            f"a request may mix {MAX_BINDINGS} adapters, this one names {len(request.mix)}",
        )
    request.bindings = [
        Binding(
            registry.resolve(
                part.adapter, part.source, request.tenant, load_inplace=part.load_inplace
            ),
            part.weight,
        )
        for part in request.parts
    ]


def bind_positions(request: Request) -> None:
    """Complete the bindings of a request whose adapters are all READY.

    An activated LoRA (Greenewald et al., arXiv 2504.12397) applies from where its invocation tokens
    begin for the last time in the prompt, as in PEFT. Without them the base model answers.

    Afterwards the order of the bindings depends on the adapters' contents alone, so that the sum of
    a mix is rounded in the same way whatever the order in which the client named it.
    """
    for binding in request.bindings:
        binding.first_position = _first_position(request, binding.version)
    request.bindings.sort(key=lambda binding: (binding.version.content_hash, binding.weight))


def _first_position(request: Request, version: AdapterVersion) -> int:
    if not version.invocation_tokens:
        return 0
    at = last_occurrence(request.prompt_token_ids, version.invocation_tokens)
    return at if at >= 0 else request.max_total  # which no token reaches
