"""Runs a batch of cases through an engine, and compares the answers with the oracle's."""

from loraplex import LLM, LoRARequest, SamplingParams

from helpers.models.peft_oracle import Case, PeftOracle

NUM_NEW_TOKENS = 10


def run(oracle: PeftOracle, cases: list[Case], *, repeat: int = 1, **options) -> list:
    """Returns the results of the last repetition and the stats; all cases are submitted at once."""
    options = {"max_num_seqs": 16, "max_num_batched_tokens": 2048, "num_pages": 2048} | options
    adapters = {name: str(oracle.adapters / name) for name in oracle.names}
    options = {
        "device": "cpu",
        "dtype": "float32",
        "in_process": True,
        "skip_tokenizer_init": True,
    } | options
    with LLM(str(oracle.base), adapters=adapters, **options) as llm:
        for _ in range(repeat):
            outputs = answer(llm, cases)
        stats = llm.client.stats()
    assert stats["running"] == stats["waiting"] == 0
    return [outputs, stats]


def answer(llm: LLM, cases: list[Case], **sampling) -> list:
    """Returns the greedy answers to all cases, which are submitted at once."""
    return llm.generate(
        [{"prompt_token_ids": case.prompt} for case in cases],
        greedy(**sampling),
        lora_request=[LoRARequest(case.adapter) if case.adapter else None for case in cases],
        use_tqdm=False,
    )


def greedy(**sampling) -> SamplingParams:
    values = {"max_tokens": NUM_NEW_TOKENS, "ignore_eos": True, "detokenize": False} | sampling
    return SamplingParams(temperature=0.0, **values)


def check(
    oracle: PeftOracle, cases: list[Case], outputs: list, num_new_tokens: int = NUM_NEW_TOKENS
) -> None:
    """Every answer is the greedy one."""
    for case, output in zip(cases, outputs, strict=True):
        got = list(output.outputs[0].token_ids)
        assert len(got) == num_new_tokens
        expected = oracle.choices(case, got)
        assert got == expected, f"{case.adapter or 'base'}, prompt of {len(case.prompt)} tokens"
        assert output.outputs[0].finish_reason == "length"
