"""Advice for flags that do not exist: vLLM's names, and the most similar name of ours."""

import difflib
from collections.abc import Iterable

_NOT_NEEDED = "leave it out"
_VLLM = {
    "--max-cpu-loras": "use --adapter-host-bytes, the host memory for adapters",
    "--lora-modules": "use --adapter NAME=PATH, once for each adapter",
    "--lora-dtype": "adapters have the model's type; leave it out",
    "--fully-sharded-loras": _NOT_NEEDED,
    "--served-model-name": "clients name adapters, not the base model; leave it out",
    "--host": "use --http HOST:PORT for OpenAI's API, --endpoint tcp://HOST:PORT for ZeroMQ",
    "--port": "use --http HOST:PORT for OpenAI's API, --endpoint tcp://HOST:PORT for ZeroMQ",
    "--api-key": "use the CurveZMQ keys, see --help under server",
    "--block-size": "use --block-tokens",
    "--kv-cache-memory-bytes": "use --pool-bytes",
    "--num-gpu-blocks-override": "use --num-pages",
    "--swap-space": "preempted requests are recomputed; leave it out",
    "--cpu-offload-gb": "weights stay on the device; leave it out",
    "--enable-chunked-prefill": "it is always on; leave it out",
    "--long-prefill-token-threshold": "unfinished prompts share each step; leave it out",
    "--max-num-partial-prefills": "unfinished prompts share each step; leave it out",
    "--scheduling-policy": "use --policy",
    "--trust-remote-code": "code in a checkpoint never runs; leave it out",
    "--hf-token": "nothing is downloaded: give a local folder as --model",
    "--revision": "nothing is downloaded: give a local folder as --model",
    "--download-dir": "nothing is downloaded: give a local folder as --model",
    "--disable-log-stats": _NOT_NEEDED,
    "--disable-log-requests": _NOT_NEEDED,
    "--tokenizer-mode": _NOT_NEEDED,
    "--enable-auto-tool-choice": "tools of requests are always offered to the model; leave it out",
    "--tool-call-parser": "the form of calls is found in the chat template; leave it out",
    "--pipeline-parallel-size": "use --tensor-parallel-size",
}


def explain(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Returns the text of the error for arguments that a parser does not know.

    A word behind an unknown flag is its value, and is not mentioned.
    """
    names, parts, is_value = sorted(known), list[str](), False
    for argument in unknown:
        is_flag = argument.startswith("-")
        if is_flag or not is_value:
            parts.append(_explain_one(argument, names))
        is_value = is_flag and "=" not in argument
    return "; ".join(parts)


def _explain_one(argument: str, known: list[str]) -> str:
    flag = argument.partition("=")[0]
    text = f"unrecognized argument {argument}"
    if not flag.startswith("-"):
        return text
    plain = "--" + flag.lstrip("-").replace("_", "-")
    if plain in known:
        return f"{text}: did you mean {plain}?"
    if plain in _VLLM:
        return f"{text}: {_VLLM[plain]}"
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
    return f"{text}: did you mean {near[0]}?" if near else f"{text}; --help lists the flags"
