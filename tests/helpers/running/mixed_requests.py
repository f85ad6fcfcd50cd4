"""The same requests for several models, over HTTP and over ZeroMQ."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from loraplex import SamplingParams

from helpers.running.http_server import BASE, Served

Job = tuple[str, str, dict[str, Any]]
"""Model, prompt and sampling parameters."""


def mixed_jobs(count: int) -> list[Job]:
    """Returns seeded requests to the base model and to both adapters."""
    models = [BASE, "a", "b", f"{BASE}:a"]
    return [
        (models[i % 4], f"request {i} " * (1 + i % 5), {"seed": i, "max_tokens": 1 + i % 13})
        for i in range(count)
    ]


def texts_over_zmq(served: Served, jobs: list[Job]) -> list[str]:
    """Returns the answers to all jobs, sent at once by one client."""
    with served.zmq() as client:
        ids = [
            client.submit(
                prompt, SamplingParams(**params), adapter=model[-1] if model != BASE else None
            )
            for model, prompt, params in jobs
        ]
        results: dict[str, Any] = {}
        while len(results) < len(ids):
            results |= {result.request_id: result for result in client.poll(60.0)}
    return [results[request_id].outputs[0].text for request_id in ids]


def texts_over_sync_http(served: Served, jobs: list[Job]) -> list[str]:
    """Returns the answers to all jobs, asked for at once by threads that share an openai client."""
    api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

    def ask(job: Job) -> str:
        model, prompt, params = job
        stream = api.completions.create(model=model, prompt=prompt, stream=True, **params)
        return "".join(chunk.choices[0].text for chunk in stream)

    with api, ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(ask, jobs))


async def texts_over_http(served: Served, jobs: list[Job]) -> list[str]:
    """Returns the answers to all jobs, asked for at once by the openai client; half as streams."""
    api = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

    async def ask(i: int) -> str:
        model, prompt, params = jobs[i]
        if i % 2:
            whole = await api.completions.create(model=model, prompt=prompt, **params)
            return whole.choices[0].text
        stream = await api.completions.create(model=model, prompt=prompt, stream=True, **params)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async with api:
        return list(await asyncio.gather(*map(ask, range(len(jobs)))))
