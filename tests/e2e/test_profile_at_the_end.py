"""A worker's process writes the timeline that it records when the engine stops."""

import json
from pathlib import Path

from loraplex import LLM, SamplingParams

from helpers.models.hf_models import make_hf_model


def test_a_timeline_under_way_is_written_at_the_end(tmp_path: Path) -> None:
    make_hf_model("llama", tmp_path / "base", seed=1)
    folder = tmp_path / "profile"
    options = {"profile_dir": str(folder), "profile_steps": 500, "profile_every": 502}
    with LLM(
        str(tmp_path / "base"), device="cpu", skip_tokenizer_init=True, num_pages=64, **options
    ) as llm:
        params = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False)
        llm.generate({"prompt_token_ids": [3, 4, 5]}, params, use_tqdm=False)
        assert not list(folder.glob("timeline-*"))
    (timeline,) = folder.glob("timeline-rank0-*.json")
    names = {event.get("name") for event in json.loads(timeline.read_text())["traceEvents"]}
    assert "aten::linear" in names
