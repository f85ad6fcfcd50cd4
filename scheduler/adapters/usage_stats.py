"""Usage counts of the base model and of each adapter, updated once or twice a request."""

from collections.abc import Iterable

from loraplex.scheduler.adapters.usage import TIERS, Usage
from loraplex.scheduler.adapters.version import AdapterState, AdapterVersion
from loraplex.scheduler.request import Request, RequestState
from loraplex.scheduler.step_builder import StepBuilder
from loraplex.scheduler.worker_protocol import AdapterLoaded


class UsageStats:
    """Keeps Usage of the base model, of each adapter, and of all adapters together.

    A request's tier says where its adapter was when the request needed it: "disk" if files had to
    be read, "host" if the host store had it, "pages" if it was resident.
    """

    def __init__(self) -> None:
        self.base = Usage()
        self.adapters = Usage()

    def _of(self, version: AdapterVersion | None) -> list[Usage]:
        if version is None:
            return [self.base]
        if version.usage is None:
            version.usage = Usage()
        return [version.usage, self.adapters]

    def on_accepted(self, request: Request) -> None:
        version = request.adapter_version
        if version is not None and version.state is not AdapterState.READY:
            request.tier = "disk"
        for usage in self._of(version):
            usage.num_requests += 1

    def on_loaded(
        self, event: AdapterLoaded, version: AdapterVersion, waited: Iterable[Request]
    ) -> None:
        """Count a load; `version` gave its path, `waited` are the requests that were parked."""
        for usage in self._of(version):
            usage.add_load(event)
        for request in waited:
            request.tier = request.tier or ("host" if event.from_host else "disk")

    def on_result(self, step: StepBuilder, now: float) -> None:
        """Count first tokens; call it before the step's tokens are appended."""
        for row in [i for i, request in enumerate(step.requests) if request.first_token_at < 0]:
            request = step.requests[row]
            if step.samples[row] and request.state is not RequestState.FINISHED:
                request.first_token_at = now
                ttft_us = int((now - request.arrival) * 1e6)
                tier = TIERS.index(request.tier or "pages")
                for usage in self._of(request.adapter_version):
                    usage.add_first_token(request.num_prompt_tokens, ttft_us, tier)

    def on_end(self, request: Request) -> None:
        num_known = request.num_prompt_tokens + len(request.generated_token_ids)
        num_generated = len(request.token_ids) - num_known
        for usage in self._of(request.adapter_version):
            usage.num_ended += 1
            usage.num_generated_tokens += num_generated
