"""Beam search of an LLM in this process, against Hugging Face's and against a plain loop."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from loraplex import LLM
from loraplex.beam_search import BeamSearchOutput
from loraplex.sampling_params import BeamSearchParams

from helpers.models.hf_models import make_hf_model, make_tokenizer

PROMPTS = [[5, 9, 200, 31], [8], [100, 3, 100, 3, 100, 3, 7, 7, 7, 7]]
EOS = 2
Beam = tuple[float, list[int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("beams")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    make_tokenizer(folder)
    return make_hf_model("llama", folder, seed=5, num_hidden_layers=2)


@pytest.fixture(scope="module")
def llm(folder: Path, model: PreTrainedModel) -> Iterator[LLM]:
    options = {"num_pages": 400, "block_tokens": 4, "max_model_len": 64}
    with LLM(str(folder), in_process=True, dtype="float32", device="cpu", **options) as made:  # type: ignore[arg-type]
        yield made


def search(model: PreTrainedModel, prompt: list[int], width: int, num_tokens: int) -> list[Beam]:
    """Keeps the `width` best continuations; an EOS among the 2 * `width` best of a beam ends it."""
    open_beams: list[Beam] = [(0.0, prompt)]
    ended: list[Beam] = []
    for _ in range(num_tokens):
        grown: list[Beam] = []
        for score, tokens in open_beams:
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1]
            best = logits.topk(2 * width).indices.tolist()
            for token, logprob in enumerate(logits.log_softmax(0).tolist()):
                if token != EOS:
                    grown.append((score + logprob, [*tokens, token]))
                elif token in best:
                    ended.append((score + logprob, [*tokens, token]))
        open_beams = sorted(grown, reverse=True)[:width]
    ended += open_beams
    ended.sort(key=lambda b: b[0] / (len(b[1]) - (b[1][-1] == EOS)), reverse=True)
    return ended[:width]


def found(output: BeamSearchOutput) -> list[list[int]]:
    return [beam.tokens for beam in output.sequences]


def test_beams_without_ends_equal_hugging_faces(llm: LLM, model: PreTrainedModel) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=9, ignore_eos=True)
    outputs = llm.beam_search(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), num_beams=4, num_return_sequences=4, max_new_tokens=9,
            do_sample=False, eos_token_id=511, pad_token_id=0, suppress_tokens=[511],
        )  # fmt: skip
        assert found(output) == expected.tolist()
        assert {beam.finish_reason for beam in output.sequences} == {"length"}


def test_beams_that_end_equal_a_loop(llm: LLM, model: PreTrainedModel) -> None:
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=6, max_tokens=5))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = search(model, prompt, 6, 5)
        assert found(output) == [tokens for _, tokens in expected]
        scores = [beam.cum_logprob for beam in output.sequences]
        assert scores == pytest.approx([score for score, _ in expected], abs=1e-3)
        for beam in output.sequences:
            assert len(beam.logprobs) == len(beam.tokens) - len(prompt)
            assert (beam.finish_reason == "stop") == (beam.tokens[-1] == EOS)


def test_text_prompts_limits_and_the_progress_bar(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    together = llm.beam_search(["The capital", "Numbers"], params)
    one_by_one = llm.beam_search(
        ["The capital", {"prompt": "Numbers"}], params, use_tqdm=True, concurrency_limit=1
    )
    assert list(map(found, together)) == list(map(found, one_by_one))
    for text, output in zip(("The capital", "Numbers"), together, strict=True):
        for beam in output.sequences:
            assert beam.tokens[:-3] == tokenizer.encode(text)
            assert beam.text == tokenizer.decode(beam.tokens, skip_special_tokens=False)
    assert llm.beam_search([], params) == []


def test_beams_end_where_the_context_does(llm: LLM) -> None:
    (output,) = llm.beam_search([[5] * 62], BeamSearchParams(beam_width=2, max_tokens=9))
    assert {len(beam.tokens) for beam in output.sequences if beam.tokens[-1] != EOS} <= {64}


@pytest.mark.parametrize(("width", "length"), [(0, 3), (65, 3), (2, 0)])
def test_wrong_sizes_are_refused(width: int, length: int) -> None:
    with pytest.raises(ValueError, match=r"beam_width must lie|max_tokens must be"):
        BeamSearchParams(beam_width=width, max_tokens=length)
