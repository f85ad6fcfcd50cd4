"""`loraplex generate`: answer prompts, by several adapters side by side if asked."""

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loraplex.engine.adapters.paths import adapters_at_start
from loraplex.engine.checkpoint.generation_defaults import generation_defaults
from loraplex.engine.errors import ConfigError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.client.lora_request import LoRARequest
from loraplex.entrypoints.client.outputs import RequestOutput
from loraplex.entrypoints.offline.llm import LLM

BASE = "base"
"""Name of the base model in --use and in the output."""


def run(args: argparse.Namespace) -> int:
    config = flags.engine_config_of(args)
    defaults = generation_defaults(config.model.model)
    params = flags.sampling_params_of(args, defaults)
    prompts = read_prompts(args.prompts, args.file)
    registered = [name for name, _ in adapters_at_start(config.adapter)]
    registered += [name for name, _ in config.adapter.adapter_mixes]
    has_stores = bool(config.store.adapter_stores)
    names = answering_models(args.use, args.compare, registered, has_stores=has_stores)
    with LLM.from_config(config, in_process=args.in_process) as llm:
        as_chat = _has_chat_template(llm) if args.chat is None else args.chat
        if args.system is not None and not as_chat:
            raise ConfigError("--system needs --chat: without it a prompt has no system message")
        inputs = [make_input(prompt, as_chat, args.system) for prompt in prompts]
        if len(inputs) == 1 and len(names) == 1 and params.n == 1 and not args.json:
            stream(llm, inputs[0], names[0], params)
            return 0
        outputs = answer_all(llm, inputs, names, params)
    for prompt, answers in zip(prompts, outputs, strict=True):
        if args.json:
            print_json(prompt, names, answers)
        else:
            print_answers(prompt, names, answers)
    return 0


def read_prompts(arguments: Sequence[str], file: str | None) -> list[str]:
    """Collect the prompts: the arguments, then the lines of the file.

    Without either, the lines of standard input are the prompts.

    Raises:
        ConfigError: there is no prompt.
    """
    prompts = list(arguments)
    if file is not None and file != "-":
        prompts += _lines(Path(file).read_text(encoding="utf-8"))
    elif file == "-" or not prompts:
        if sys.stdin.isatty():
            print("loraplex: one prompt a line, Ctrl-D ends them", file=sys.stderr)
        prompts += _lines(sys.stdin.read())
    if not prompts:
        raise ConfigError("no prompt: give one as an argument, with --file, or on standard input")
    return prompts


def answering_models(
    use: str | None, compare: bool, registered: Sequence[str], *, has_stores: bool = False
) -> list[str]:
    """Names of the models that answer, in the order of the output.

    Args:
        has_stores: a name that is not registered may be in a store.

    Raises:
        ConfigError: a name in `use` is no registered adapter; the message lists those that are.
    """
    if use is None:
        names = list(registered) or [BASE]
    else:
        names = [name.strip() for name in use.split(",") if name.strip()]
        if not names:
            raise ConfigError("--use names no model: write --use a,b or leave it out")
    for name in names:
        if name != BASE and name not in registered and not has_stores:
            known = ", ".join([BASE, *registered])
            raise ConfigError(f"--use: {name!r} is not registered; there are {known}")
    if compare and BASE not in names:
        names.insert(0, BASE)
    return list(dict.fromkeys(names))


def make_input(prompt: str, as_chat: bool, system: str | None = None) -> dict[str, Any]:
    """Input of the client's generate(): a prompt, or the messages of a chat."""
    if not as_chat:
        return {"prompt": prompt}
    messages = [{"role": "system", "content": system}] if system is not None else []
    return {"messages": [*messages, {"role": "user", "content": prompt}]}


def stream(llm: LLM, prompt: dict[str, Any], name: str, params: SamplingParams) -> None:
    """Print one answer while it is generated."""
    printed = 0
    adapter = None if name == BASE else name
    for output in llm.client.generate(prompt, params, adapter=adapter):
        text = output.outputs[0].text
        print(text[printed:], end="", flush=True)
        printed = len(text)
    print()


def answer_all(
    llm: LLM, inputs: Sequence[dict[str, Any]], names: Sequence[str], params: SamplingParams
) -> list[list[RequestOutput]]:
    """Answer every prompt by every model in one batch; returns the outputs of each prompt."""
    adapters = [None if name == BASE else LoRARequest(name) for _ in inputs for name in names]
    repeated = [given for given in inputs for _ in names]
    bar = sys.stderr.isatty()
    if "messages" in inputs[0]:
        chats = [given["messages"] for given in repeated]
        outputs = llm.chat(chats, params, lora_request=adapters, use_tqdm=bar)
    else:
        outputs = llm.generate(repeated, params, lora_request=adapters, use_tqdm=bar)
    return [outputs[i : i + len(names)] for i in range(0, len(outputs), len(names))]


def print_json(prompt: str, names: Sequence[str], outputs: Sequence[RequestOutput]) -> None:
    """Print one JSON object per answer."""
    for name, output in zip(names, outputs, strict=True):
        for line in json_lines(prompt, name, output):
            print(json.dumps(line, ensure_ascii=False))
    sys.stdout.flush()


def json_lines(prompt: str, name: str, output: RequestOutput) -> Iterable[dict[str, Any]]:
    """Yield one object per answer."""
    for answer in output.outputs:
        line: dict[str, Any] = {
            "prompt": prompt,
            "adapter": None if name == BASE else name,
            "index": answer.index,
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            "num_prompt_tokens": len(output.prompt_token_ids or ()),
            "num_cached_tokens": output.num_cached_tokens,
        }
        if answer.logprobs is not None:
            line["logprobs"] = [
                {token: entry.logprob for token, entry in position.items()}
                for position in answer.logprobs
            ]
        if output.prompt_logprobs is not None:
            line["prompt_logprobs"] = [
                position and {token: entry.logprob for token, entry in position.items()}
                for position in output.prompt_logprobs
            ]
        yield line


def print_answers(prompt: str, names: Sequence[str], outputs: Sequence[RequestOutput]) -> None:
    """Print a prompt, and below it each answer beside the name of its model."""
    margin = max(len(name) for name in names) + 4
    width = max(shutil.get_terminal_size((100, 24)).columns, margin + 30)
    print(prompt)
    for name, output in zip(names, outputs, strict=True):
        for answer in output.outputs:
            text = answer.text.strip() or "(no text)"
            lines = [
                part
                for line in text.splitlines()
                for part in textwrap.wrap(line, width - margin) or [""]
            ]
            for number, line in enumerate(lines):
                head = name if number == 0 else ""
                print(f"  {head:<{margin - 2}}{line}".rstrip())
    print(flush=True)


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _has_chat_template(llm: LLM) -> bool:
    model = llm.config.model
    if model.skip_tokenizer_init:
        return False
    return bool(llm.engine_tokenizer.chat_template)
