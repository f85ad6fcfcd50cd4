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
    if name == "tools" and mode == "continue":
        with pytest.raises(ClientError, match="drops the last message"):
            ours.apply_chat_template(CHAT, **flags)
        return
    more: dict[str, Any] = {"tools": [{"name": "f", "text": "é<&>"}]} if name == "tools" else {}
    want = theirs.apply_chat_template(CHAT, tokenize=False, **flags, **more)
    assert ours.apply_chat_template(CHAT, **flags, **more) == want


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
    assert load_tokenizer(tmp_path).apply_chat_template(CHAT) == CHAT[0]["content"]


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
        [{"role": "user", "content": ["x"]}],
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
