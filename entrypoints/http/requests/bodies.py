"""The bodies of HTTP requests. Names are OpenAI's and vLLM's.

A field that is None was left out. Ranges are checked by SamplingParams and protocol.parse().
"""

from typing import Any

from pydantic import BaseModel, ConfigDict


class StreamOptions(BaseModel):
    include_usage: bool = False


class GenerationBody(BaseModel):
    """The fields that completions and chats share."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None  # the header X-Request-Id goes before it
    timeout_s: float | None = None  # as in the ZeroMQ protocol
    lora_path: str | None = None  # SGLang's: the name of an adapter
    adapters: list[dict[str, Any]] | None = None  # a mix, as in the ZeroMQ protocol
    return_token_ids: bool | None = None


class CompletionBody(GenerationBody):
    prompt: str | list[Any] | None = None  # text, texts, token ids, or lists of token ids
    echo: bool | None = None
    logprobs: int | None = None


class ChatBody(GenerationBody):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(BaseModel):
    """A text or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(BaseModel):
    model: str | None = None
    tokens: list[int]


class LoadAdapterBody(BaseModel):
    """`pinned` is SGLang's."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    pinned: bool = False


class AdapterBody(BaseModel):
    """Names one adapter."""

    lora_name: str = ""
