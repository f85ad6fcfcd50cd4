"""The tasks of vLLM's engine examples: the step loop, several adapters, asyncio streams."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from loraplex.engine.arg_utils import AsyncEngineArgs
from loraplex.lora.request import LoRARequest
from loraplex.sampling_params import RequestOutputKind
from loraplex.utils.argparse_utils import FlexibleArgumentParser
from loraplex.v1.engine.async_llm import AsyncLLM

pytestmark = pytest.mark.e2e

Asked = tuple[str, SamplingParams, LoRARequest | None]


@pytest.fixture(scope="module")
def engine(flags: list[str]) -> Iterator[LLMEngine]:
    parser = FlexibleArgumentParser(description="Demo on using the LLMEngine class directly")
    parser = EngineArgs.add_cli_args(parser)
    words = [*flags, "--enable-lora", "--max-loras", "1", "--max_cpu_loras=2"]
    made = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(words)))
    yield made
    made.shutdown()


def process_requests(engine: LLMEngine, asked: list[Asked]) -> dict[str, RequestOutput]:
    """Adds a request at each step until none is left. Returns the last outputs by id."""
    finished: dict[str, RequestOutput] = {}
    request_id = 0
    while asked or engine.has_unfinished_requests():
        if asked:
            prompt, sampling_params, lora_request = asked.pop(0)
            engine.add_request(str(request_id), prompt, sampling_params, lora_request=lora_request)
            request_id += 1
        for output in engine.step():
            if output.finished:
                print(output)
                finished[output.request_id] = output
    return finished


def test_the_step_loop(engine: LLMEngine) -> None:
    asked: list[Asked] = [
        ("A robot may not injure", SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1),
         None),
        ("To be or not to be,", SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.2),
         None),
        ("What is the meaning of life?",
         SamplingParams(n=2, temperature=0.8, top_p=0.95, frequency_penalty=0.1), None),
    ]  # fmt: skip
    outputs = process_requests(engine, asked)
    assert sorted(outputs) == ["0", "1", "2"]
    assert [len(outputs[str(i)].outputs) for i in range(3)] == [1, 1, 2]
    scored = outputs["0"]
    assert scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[0] is None
    assert len(scored.prompt_logprobs) == len(scored.prompt_token_ids or ())
    answer = scored.outputs[0]
    assert len(answer.logprobs or ()) == len(answer.token_ids)


def test_several_adapters(engine: LLMEngine, models: Path) -> None:
    """The folder has two names; with max_loras=1 the second one's requests may run later."""
    folder = str(models / "a")
    question = "[user] Name the ICAO for lilongwe international airport [/user] [assistant]"
    plain = SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1, max_tokens=24)
    stops = SamplingParams(
        temperature=0.0, logprobs=1, prompt_logprobs=1, max_tokens=24, stop_token_ids=[300]
    )
    asked: list[Asked] = [
        ("A robot may not injure a human being", plain, None),
        ("To be or not to be,", SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.2,
                                               max_tokens=24), None),
        (question, stops, LoRARequest("sql-lora", 1, folder)),
        (question, stops, LoRARequest("sql-lora2", 2, folder)),
        (question, stops, LoRARequest("other", 3, str(models / "b"))),
        (question, stops, None),
    ]  # fmt: skip
    outputs = process_requests(engine, asked)
    answers = [list(outputs[str(i)].outputs[0].token_ids) for i in range(6)]
    assert answers[2] == answers[3]
    assert answers[2] not in (answers[4], answers[5])
    lora_request = outputs["3"].lora_request
    assert lora_request is not None
    assert (lora_request.lora_name, lora_request.lora_int_id) == ("sql-lora2", 2)


async def stream_response(engine: AsyncLLM, prompt: str, request_id: str) -> list[str]:
    params = SamplingParams(
        max_tokens=20, temperature=0.8, top_p=0.95, seed=42, output_kind=RequestOutputKind.DELTA
    )
    pieces: list[str] = []
    async for output in engine.generate(
        request_id=request_id, prompt=prompt, sampling_params=params
    ):
        pieces += [completion.text for completion in output.outputs if completion.text]
        if output.finished:
            assert output.metrics is not None
            break
    return pieces


async def use_adapters(engine: AsyncLLM, models: Path) -> None:
    adapter = LoRARequest("a", 7, str(models / "a"))
    assert await engine.add_lora(adapter)
    assert not await engine.add_lora(adapter)
    assert await engine.list_loras() == {7}
    assert await engine.pin_lora(7)
    with pytest.raises(ValueError, match="no adapter has lora_int_id 8"):
        await engine.pin_lora(8)
    assert await engine.add_lora(LoRARequest("a", 7, str(models / "b"), load_inplace=True))
    params = SamplingParams(temperature=0.0, max_tokens=12)
    named = LoRARequest("a", 7)  # what is loaded under the name
    by_id = [o async for o in engine.generate("Hello", params, "1", lora_request=named)]
    folder = LoRARequest("b", 9, str(models / "b"))
    by_path = [o async for o in engine.generate("Hello", params, "2", lora_request=folder)]
    assert by_id[-1].outputs[0].token_ids == by_path[-1].outputs[0].token_ids
    assert await engine.remove_lora(7)
    assert not await engine.remove_lora(7)
    assert await engine.list_loras() == set()
    assert await engine.reset_prefix_cache()


def test_asyncio_streams(models: Path) -> None:
    prompts = ["The future of artificial intelligence is", "In a galaxy far, far away", "The key"]

    async def main() -> None:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(models / "base"), enforce_eager=True, num_pages=300, max_model_len=512
            )
        )
        try:
            first = [await stream_response(engine, p, f"one-{i}") for i, p in enumerate(prompts)]
            again = await asyncio.gather(
                *(stream_response(engine, p, f"all-{i}") for i, p in enumerate(prompts))
            )
            assert ["".join(pieces) for pieces in first] == ["".join(pieces) for pieces in again]
            assert all(len(pieces) > 1 for pieces in first)
            await use_adapters(engine, models)
        finally:
            engine.shutdown()

    asyncio.run(main())
