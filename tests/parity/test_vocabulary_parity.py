"""Adapters that change the token embedding or the head, against PEFT in fp32, token for token.

They run alone, and beside plain LoRA and base rows in one batch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import LLM, LoRAMix
from loraplex.engine.errors import ClientError

from helpers.models.engine_runs import answer, check, greedy, run
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_oracle import Case, make_cases
from helpers.models.peft_oracles import PeftOracles
from helpers.models.vocabulary_adapters import change_base_rows
from helpers.vocabularies.resized_models import make_resized_adapter

QKV = ["q_proj", "k_proj", "v_proj"]
RANK = {"r": 5, "alpha": 9}
ROWS = tuple(range(0, 512, 3))
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "alpha": 16, "targets": [*QKV, "o_proj"]},
    "dora": {"r": 8, "alpha": 16, "targets": "all-linear", "use_dora": True},
    "head": {**RANK, "targets": [*QKV, "lm_head"]},
    "embedding": {**RANK, "targets": ["embed_tokens", "down_proj"]},
    "both": {
        **RANK, "targets": ["embed_tokens", "lm_head"], "save_embedding_layers": "auto",
        "rank_pattern": {"lm_head": 3}, "alpha_pattern": {"embed_tokens": 4}, "use_rslora": True,
    },
    "tokens": {**RANK, "targets": QKV, "trainable_token_indices": list(ROWS)},
    "tokens-of-each": {
        **RANK, "targets": QKV,
        "trainable_token_indices": {"lm_head": [7, 3, 500], "embed_tokens": [9, 3, *ROWS[5:]]},
    },
    "saved-below-lora": {
        **RANK, "targets": ["embed_tokens", "lm_head"], "save_embedding_layers": "auto",
    },
    "saved": {
        **RANK, "targets": ["up_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
        "saved_tokens": ROWS,
    },
}  # fmt: skip
TIED: dict[str, dict[str, Any]] = {
    "lora": KINDS["lora"],
    "head": KINDS["head"],
    "embedding": KINDS["embedding"],
    "both-tied": {**RANK, "targets": [*QKV, "embed_tokens"], "ensure_weight_tying": True},
    "tokens": KINDS["tokens"],
    "saved-one": {
        **RANK, "targets": QKV, "modules_to_save": ["embed_tokens"], "saved_tokens": ROWS,
    },
    "saved-tied": {
        **RANK, "targets": QKV, "modules_to_save": ["embed_tokens"], "saved_tokens": ROWS,
        "ensure_weight_tying": True,
    },
}  # fmt: skip
RESIZED: dict[str, tuple[int, dict[str, Any]]] = {
    "added": (520, {**RANK, "targets": QKV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "added-lora": (601, {**RANK, "targets": ["up_proj", "embed_tokens", "lm_head"]}),
    "fewer": (505, {**RANK, "targets": QKV}),
}
TIED_RESIZED: dict[str, tuple[int, dict[str, Any]]] = {
    "added-tokens": (
        517, {**RANK, "targets": QKV, "trainable_token_indices": [3, *range(512, 517)]},
    ),
    "added-tied": (514, {**RANK, "targets": QKV}),
}  # fmt: skip
NAMES = [*KINDS, *RESIZED]


def make_oracle(
    root: Path,
    kinds: dict[str, dict[str, Any]],
    resized: dict[str, tuple[int, dict[str, Any]]],
    **overrides: Any,
) -> PeftOracles:
    model = make_hf_model("llama", root / "base", seed=3, **overrides)
    for seed, (name, options) in enumerate(kinds.items()):
        folder = make_adapter(model, root / "adapters" / name, seed=seed, **options)
        if name == "saved-below-lora":
            change_base_rows(folder)
    alone = ("tokens", "saved", "both-tied")
    groups = [
        [name for name in kinds if not name.startswith(alone)],
        [name for name in kinds if name.startswith("tokens")],
        *([name] for name in kinds if name.startswith(alone[1:])),
    ]
    for name, (num_tokens, options) in resized.items():
        make_resized_adapter(root / "base", root / "adapters" / name, num_tokens, **options)
    return PeftOracles(
        root / "base",
        root / "adapters",
        groups=groups,
        resized={name: num_tokens for name, (num_tokens, _) in resized.items()},
    )


def own_tokens(cases: list[Case]) -> list[Case]:
    """Returns the cases with tokens of their adapters' vocabularies, the last one among them."""
    sizes = {name: size for name, (size, _) in (RESIZED | TIED_RESIZED).items()}

    def change(case: Case) -> Case:
        size = sizes[case.adapter]
        prompt = [token % size if i % 4 else size - 1 for i, token in enumerate(case.prompt)]
        return Case(case.adapter, tuple(prompt))

    return [change(case) if case.adapter in sizes else case for case in cases]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PeftOracles:
    return make_oracle(tmp_path_factory.mktemp("vocabulary"), KINDS, RESIZED, vocab_size=511)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> PeftOracles:
    root = tmp_path_factory.mktemp("tied")
    return make_oracle(root, TIED, TIED_RESIZED, tie_word_embeddings=True)


def test_one_batch_of_all_kinds(oracle: PeftOracles) -> None:
    cases = own_tokens(make_cases(oracle, (1, 17, 64), adapters=("", *NAMES)))
    outputs, _ = run(oracle, cases)
    check(oracle, cases, outputs)
    answers = {(case.adapter, case.prompt): tuple(o.outputs[0].token_ids)
               for case, o in zip(cases, outputs, strict=True)}  # fmt: skip
    for name in ("added", "added-lora"):
        assert any(max(answers[a, p]) >= 511 for a, p in answers if a == name), name
    for name in KINDS:
        assert any(answers[name, p] != answers["", p] for a, p in answers if a == name), name


@pytest.mark.parametrize("name", [*TIED, *TIED_RESIZED])
def test_a_tied_head(tied: PeftOracles, name: str) -> None:
    cases = own_tokens(make_cases(tied, (1, 40), adapters=("", name)))
    outputs, _ = run(tied, cases)
    check(tied, cases, outputs)


@pytest.mark.parametrize("name", list(KINDS)[2:])
def test_alone(oracle: PeftOracles, name: str) -> None:
    cases = make_cases(oracle, (1, 40), adapters=(name,))
    outputs, _ = run(oracle, cases)
    check(oracle, cases, outputs)


def test_chunked_prefill(oracle: PeftOracles) -> None:
    cases = own_tokens(make_cases(oracle, (3, 70), adapters=("", *NAMES)))
    outputs, _ = run(oracle, cases, max_num_seqs=8, max_num_batched_tokens=11)
    check(oracle, cases, outputs)


def test_preemption(oracle: PeftOracles) -> None:
    adapters = ("", "head", "embedding", "added")
    cases = own_tokens(make_cases(oracle, (36, 40, 41, 50), adapters=adapters))
    options = {"block_tokens": 4, "num_pages": 210, "enable_prefix_caching": False}
    outputs, stats = run(oracle, cases, repeat=3, **options)
    check(oracle, cases, outputs)
    assert stats["num_preemptions"] > 0


def test_prefix_cache_warm(oracle: PeftOracles) -> None:
    cases = own_tokens(make_cases(oracle, (17, 100), adapters=("", *NAMES)))
    outputs, _ = run(oracle, cases, repeat=2)
    check(oracle, cases, outputs)
    assert all(
        o.num_cached_tokens == (len(c.prompt) - 1) // 16 * 16
        for o, c in zip(outputs, cases, strict=True)
    )


def test_no_mix_has_them(oracle: PeftOracles) -> None:
    names = ("lora", "head", "embedding", "tokens")
    with LLM(
        str(oracle.base), device="cpu", dtype="float32", skip_tokenizer_init=True, in_process=True,
        num_pages=1024, adapters={name: str(oracle.adapters / name) for name in names},
    ) as llm:  # fmt: skip
        for name in names[1:]:
            with pytest.raises(ClientError, match=rf"'{name}' is of the kind lora\+{name}"):
                mix = LoRAMix(["lora", name])
                llm.generate({"prompt_token_ids": [5]}, greedy(), lora_request=mix, use_tqdm=False)


@pytest.fixture(scope="module")
def two_ranks(oracle: PeftOracles) -> Iterator[LLM]:
    with LLM(
        str(oracle.base), device="cpu", dtype="float32", skip_tokenizer_init=True,
        tensor_parallel_size=2, num_pages=1024, max_num_seqs=8, max_num_batched_tokens=40,
        adapters={name: str(oracle.adapters / name) for name in NAMES},
    ) as llm:  # fmt: skip
        yield llm


def test_two_ranks(oracle: PeftOracles, two_ranks: LLM) -> None:
    cases = own_tokens(make_cases(oracle, (1, 17, 64), adapters=("", *NAMES)))
    check(oracle, cases, answer(two_ranks, cases))
