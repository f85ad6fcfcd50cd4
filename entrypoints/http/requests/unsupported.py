"""Tells the fields of a body that would change the answer and are not supported from the others.

Fields of the first kind are refused. Unknown ones are ignored with a warning in the log, as in
vLLM.
"""

import logging
from typing import Any

from loraplex.entrypoints.http.errors import HttpError

_NOT_YET = "is not supported"
_GUIDED = "is not supported: use structured_outputs"
REFUSED = {
    "suffix": "is not supported: the models continue a text, they do not fill a gap",
    "best_of": "is not supported: use n",
    "use_beam_search": _NOT_YET,
    "length_penalty": _NOT_YET,
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "logits_processors": _NOT_YET,
    "truncate_prompt_tokens": "is not supported: shorten the prompt",
    "prompt_embeds": _NOT_YET,
    "chat_template": "is not taken from clients: start the server with --chat-template",
    "functions": "is not supported: use tools",
    "function_call": "is not supported: use tool_choice",
    "audio": "is not supported: the models write text alone",
    "return_tokens_as_token_ids": "is not supported: use return_token_ids",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "length_penalty": (1, 1.0),
    "function_call": ("none", "auto"),
}
"""Values that change nothing, besides null, false and empty ones."""

IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
     "modalities", "spaces_between_special_tokens")
)  # fmt: skip
"""Fields that clients send and that mean nothing here."""

MAX_WARNINGS = 100

logger = logging.getLogger("loraplex.http")
_warned: set[str] = set()


def check_extra_fields(extra: dict[str, Any]) -> None:
    """Warns of unknown fields, once for each name.

    Raises:
        HttpError: a field would change the answer.
    """
    for name, value in extra.items():
        if name in REFUSED:
            if value and value not in _NEUTRAL.get(name, ()):
                raise HttpError(400, f"{name} {REFUSED[name]}", param=name)
        elif name not in IGNORED and name not in _warned and len(_warned) < MAX_WARNINGS:
            _warned.add(name)
            logger.warning("unknown fields of requests are ignored: %.60r", name)
