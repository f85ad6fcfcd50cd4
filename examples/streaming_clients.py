"""Streams from a running server with two asyncio clients at the same time.

loraplex serve --adapter-dir examples/adapters        # in another terminal
python examples/streaming_clients.py [ENDPOINT]
"""

import asyncio
import sys

from loraplex import AsyncClient, RequestOutputKind, SamplingParams

ENDPOINT = "tcp://127.0.0.1:5599"
MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]


async def stream(endpoint: str, adapter: str | None) -> None:
    # With DELTA each output holds only the new text; by default it holds everything so far.
    params = SamplingParams(temperature=0.0, max_tokens=40, output_kind=RequestOutputKind.DELTA)
    async with AsyncClient(endpoint) as client:
        async for output in client.chat(MESSAGES, params, adapter=adapter):
            print(f"{adapter or 'base':>8}: {output.outputs[0].text!r}")


async def main(endpoint: str) -> None:
    await asyncio.gather(stream(endpoint, None), stream(endpoint, "pirate"))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else ENDPOINT))
