"""Runs a batch job in which each request names its adapter.

python examples/offline_batch.py
"""

from pathlib import Path

from loraplex import LLM, LoRARequest, SamplingParams

PIRATE = LoRARequest("pirate", 1, str(Path(__file__).resolve().parent / "adapters" / "pirate"))
QUESTIONS = ["What is a hurricane?", "How do I make a sandwich?", "Tell me about thunder."]

# No main guard is needed: the engine's processes do not import this script.
with LLM() as llm:
    requests = [(question, adapter) for question in QUESTIONS for adapter in (None, PIRATE)]
    outputs = llm.chat(
        [[{"role": "user", "content": question}] for question, _ in requests],
        SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=60),
        lora_request=[adapter for _, adapter in requests],
    )

for (question, adapter), output in zip(requests, outputs, strict=True):
    name = adapter.lora_name if adapter else "base"
    print(f"[{name}] {question}\n    {output.outputs[0].text.strip()}\n")
