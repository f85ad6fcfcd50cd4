"""Two asyncio clients of a running server stream at the same time.

loraplex serve --adapter-dir examples/adapters        # in another terminal
python examples/streaming_clients.py [ENDPOINT]
"""

import asyncio
import sys

from loraplex import AsyncClient, SamplingParams

ENDPOINT = "tcp://127.0.0.1:5599"
MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]


async def stream(endpoint: str, adapter: str | None) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40)
    async with AsyncClient(endpoint) as client:
        num_seen = 0
        async for output in client.chat(MESSAGES, params, adapter=adapter):
            text = output.outputs[0].text
            print(f"{adapter or 'base':>8}: {text[num_seen:]!r}")
            num_seen = len(text)


async def main(endpoint: str) -> None:
    await asyncio.gather(stream(endpoint, None), stream(endpoint, "pirate"))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else ENDPOINT))
