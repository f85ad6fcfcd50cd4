"""AsyncLLM over the packaged SmolLM2: streams in each kind, adapters, aborts."""

import asyncio
from pathlib import Path

import pytest

from loraplex import AsyncEngineArgs, AsyncLLM
from loraplex.inputs import TextPrompt
from loraplex.lora.request import LoRARequest
from loraplex.sampling_params import RequestOutputKind, SamplingParams

pytestmark = pytest.mark.e2e

ADAPTERS = Path(__file__).resolve().parents[3] / "examples" / "adapters"
PROMPT = TextPrompt(prompt="The capital of France is")


def params(kind: RequestOutputKind, num: int = 12) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True, output_kind=kind)


async def texts(engine: AsyncLLM, kind: RequestOutputKind, request_id: str) -> list[str]:
    outputs = engine.generate(PROMPT, params(kind), request_id)
    return [output.outputs[0].text async for output in outputs]


async def stream_all(engine: AsyncLLM) -> None:
    cumulative, delta, final = await asyncio.gather(
        *(texts(engine, kind, f"stream-{kind}") for kind in RequestOutputKind)
    )
    assert "Paris" in cumulative[-1]
    assert "".join(delta) == cumulative[-1]
    assert final == [cumulative[-1]]
    assert all(b.startswith(a) for a, b in zip(cumulative, cumulative[1:], strict=False))
    await use_adapter(engine, cumulative[-1])
    await abort(engine)


async def use_adapter(engine: AsyncLLM, base: str) -> None:
    pirate = LoRARequest("pirate", 1, str(ADAPTERS / "pirate"))
    kind = params(RequestOutputKind.FINAL_ONLY)
    outputs = engine.generate(
        prompt=PROMPT, sampling_params=kind, request_id="lora", lora_request=pirate
    )
    (output,) = [output async for output in outputs]
    assert output.finished
    assert output.outputs[0].text != base


async def abort(engine: AsyncLLM) -> None:
    reason = None
    async for output in engine.generate(PROMPT, params(RequestOutputKind.DELTA, 900), "long"):
        reason = output.outputs[0].finish_reason
        await engine.abort("long")
    assert reason == "abort"


def test_streams_of_one_engine() -> None:
    async def main() -> None:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(enforce_eager=True, num_pages=600, max_model_len=1024, max_cpu_loras=2)
        )
        try:
            await stream_all(engine)
        finally:
            engine.shutdown()
            engine.shutdown()

    asyncio.run(main())
