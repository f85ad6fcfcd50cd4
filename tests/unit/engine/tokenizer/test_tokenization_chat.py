"""Chat templates, against `transformers.apply_chat_template`, and their sandbox."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loraplex.engine.errors import ClientError, ConfigError
from loraplex.engine.tokenizer.chat_template import ChatTemplate
from loraplex.engine.tokenizer.loading import load_tokenizer

from helpers.models.hf_models import make_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": " hi there "},
    {"role": "assistant", "content": " Well,"},
]

# Written for this test; each uses what real templates lean on.
TEMPLATES = {
    "chatml": None,
    "llama-like": """{{- bos_token }}
    {%- for message in messages %}
        {%- if message.role not in ['system', 'user', 'assistant'] %}
            {{- raise_exception('unknown role ' ~ message.role) }}
        {%- endif %}
        {{- '[' + message['role'] | upper + ']\n' + message['content'] | trim + eos_token }}
    {%- endfor %}
    {%- if add_generation_prompt %}{{- '[ASSISTANT]\n' }}{%- endif %}""",
    "blocks": """
{% for message in messages %}
    {% if loop.first %}
start
    {% endif %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
  {{ message.role | tojson }}
{% generation %}
{{ message.content }}
{% endgeneration %}
{% endfor %}
{% set ns = namespace(count=0) %}{% set ns.count = messages | length %}{{ ns.count }}""",
    "is-not-none": "{{ tools is not none }}{{ documents is none }}{{ tools is defined }}",
    "parts": """{% for m in messages %}{% if m.content is string %}{{ m.content }}
    {%- else %}{% for part in m.content %}<{{ part.type }}>{{ part['text'] }}{% endfor %}{% endif %}
    {%- for call in m.tool_calls or [] %}{{ call.function.name }}
        {%- for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}
    {%- endfor %}{{ m.reasoning_content }}{{ '|' }}{% endfor %}{{ mood }}""",
    "tools": "{{ tools | tojson(indent=2) if tools else 0 }}|{{ strftime_now('%Y') | length }}",
}


def _folder(path: Path, template: str | None) -> Path:
    make_tokenizer(path)
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("mode", ["answer", "plain", "continue"])
def test_rendering_equals_transformers(name: str, mode: str, tmp_path: Path) -> None:
    path = _folder(tmp_path, TEMPLATES[name])
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    flags = {
        "add_generation_prompt": mode == "answer",
        "continue_final_message": mode == "continue",
    }
    if name in ("tools", "is-not-none") and mode == "continue":
        with pytest.raises(ClientError, match="drops the last message"):
            ours.apply_chat_template(CHAT, **flags)
        return
    more: dict[str, Any] = {"tools": [{"name": "f", "text": "é<&>"}]} if name == "tools" else {}
    want = theirs.apply_chat_template(CHAT, tokenize=False, **flags, **more)
    assert ours.apply_chat_template(CHAT, **flags, **more) == want


PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {
        "role": "assistant",
        "content": None,
        "thinking": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    },
    {"role": "tool", "content": "5", "tool_call_id": None},
    {"role": "assistant", "content": [{"type": "text", "text": "so"}]},
]


@pytest.mark.parametrize("mode", ["answer", "continue"])
def test_parts_tool_calls_and_variables_equal_transformers(mode: str, tmp_path: Path) -> None:
    path = _folder(tmp_path, TEMPLATES["parts"])
    flags = {
        "add_generation_prompt": mode == "answer",
        "continue_final_message": mode == "continue",
        "mood": "" if mode == "continue" else "gay",
    }
    want = AutoTokenizer.from_pretrained(path).apply_chat_template(PARTS, tokenize=False, **flags)
    tokenizer = load_tokenizer(path)
    assert tokenizer.apply_chat_template(PARTS, **flags) == want
    as_json = json.loads(json.dumps(PARTS))
    as_json[1]["tool_calls"][0]["function"]["arguments"] = '{"x": 1}'  # as OpenAI's clients send it
    assert tokenizer.apply_chat_template(as_json, **flags) == want
    ids = tokenizer.apply_chat_template(PARTS, tokenize=True, **flags)
    assert ids == tokenizer.encode(want, add_special_tokens=False)


def test_a_template_of_plain_texts_gets_the_parts_joined(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(
        _folder(tmp_path, "{% for m in messages %}{{ m.content + ';' }}{% endfor %}")
    )
    chat = [{"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]}]
    assert tokenizer.apply_chat_template(chat) == "a\nb;"
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(ClientError, match="part 0 .* 'image_url': this model reads text alone"):
        tokenizer.apply_chat_template(chat)


def test_a_callers_template_replaces_the_models(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_folder(tmp_path, None))
    text = tokenizer.apply_chat_template(
        CHAT, chat_template="{{ messages | length }}{{ eos_token }}"
    )
    assert text == "3</s>"
    other = load_tokenizer(tmp_path, "", "{{ 'mine' }}")
    assert other.apply_chat_template(CHAT) == "mine"
    with pytest.raises(ConfigError, match="chat_template /nowhere"):
        load_tokenizer(tmp_path, "", "/nowhere")


@pytest.mark.parametrize("content", ["", "e", "<", "Well, ", "a\nb"])
def test_continuing_leaves_the_last_turn_open(content: str, tmp_path: Path) -> None:
    chat = [*CHAT[:2], {"role": "assistant", "content": content}]
    tokenizer = load_tokenizer(_folder(tmp_path, None))
    text = tokenizer.apply_chat_template(
        chat, add_generation_prompt=False, continue_final_message=True
    )
    assert text.endswith(" hi there <|im_end|>\n<|im_start|>assistant\n" + content)


def test_the_template_may_refuse(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_folder(tmp_path, TEMPLATES["llama-like"]))
    with pytest.raises(ClientError, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_several_templates_in_the_config(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    path.write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.apply_chat_template(CHAT) == CHAT[0]["content"]
    for tools in (None, [], [{"name": "f"}]):
        want = theirs.apply_chat_template(CHAT, tokenize=False, tools=tools)
        assert ours.apply_chat_template(CHAT, tools=tools) == want


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_folder(tmp_path, ""))
    with pytest.raises(ClientError, match="no chat template.*--chat-template"):
        tokenizer.apply_chat_template(CHAT)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        {"role": "user", "content": "x"},
        ["hello"],
        [{"role": "user"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": [3]}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "assistant", "tool_calls": "f"}],
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
        [{"role": "user", "content": None}],
    ],
)
def test_malformed_messages_are_the_clients_fault(messages: Any) -> None:
    with pytest.raises(ClientError, match="message"):
        ChatTemplate("{{ messages }}", {}).render(messages)


def test_flags_that_exclude_each_other() -> None:
    with pytest.raises(ClientError, match="needs add_generation_prompt=false"):
        ChatTemplate("x", {}).render(CHAT, continue_final_message=True)


def test_bad_syntax_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate("ok\n{% for %}", {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ 1 // 0 }}",
        "{{ undefined_thing.attribute }}",
        "{{ messages[0] + 1 }}",
    ],
)
def test_the_sandbox_holds_and_errors_are_client_errors(source: str) -> None:
    chat = [dict(message) for message in CHAT]
    with pytest.raises(ClientError, match="refuses these messages"):
        ChatTemplate(source, {}).render(chat)
    assert chat == CHAT
