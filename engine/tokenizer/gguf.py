"""Builds the tokenizer of a GGUF file: byte-level BPE, or a SentencePiece vocabulary."""

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from loraplex.engine.checkpoint.gguf_file import GGUFFile
from loraplex.engine.errors import ConfigError
from loraplex.engine.tokenizer.fast import FastBackend, set_bos_eos
from loraplex.engine.tokenizer.sentencepiece import SentencePieceBackend, make_proto
from loraplex.engine.tokenizer.tokenizer import Tokenizer, TokenizerBackend, TokenizerTraits

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

# Patterns that split a text before the merges, by tokenizer.ggml.pre.
_WORDS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PRE_TOKENIZERS = ("smollm", *_WORDS)


class _Metadata:
    """Reads the `tokenizer.ggml` keys of a file."""

    def __init__(self, file: GGUFFile) -> None:
        self._values = file.metadata
        self.tokens: list[str] = self.read("tokens") or []
        self.types: list[int] = self.read("token_type") or [1] * len(self.tokens)
        sources = {
            "bos_token": "bos",
            "eos_token": "eos",
            "unk_token": "unknown",
            "pad_token": "padding",
        }
        self.named = {
            name: token
            for name, source in sources.items()
            if (token := self._token(source)) is not None
        }

    def read(self, key: str, default: Any = None) -> Any:
        return self._values.get(f"tokenizer.ggml.{key}", default)

    def of_type(self, kind: int) -> list[int]:
        return [i for i, found in enumerate(self.types) if found == kind]

    def special_ids(self) -> list[int]:
        """Returns the control tokens and those that the file names, whatever their type."""
        ends = [i for i in self.end_ids() if i < len(self.tokens)]
        named = [self.tokens.index(token) for token in self.named.values()]
        return sorted({*self.of_type(_CONTROL), *named, *ends})

    def end_ids(self) -> tuple[int, ...]:
        """Returns the ids that end a sequence, a turn or a message."""
        found = (self.read(f"{name}_token_id") for name in ("eos", "eot", "eom"))
        return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))

    def _token(self, name: str) -> str | None:
        token_id = self.read(f"{name}_token_id")
        known = token_id is not None and token_id < len(self.tokens)
        return self.tokens[token_id] if known else None


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """Builds a tokenizer from the file's metadata.

    Raises:
        ConfigError: the file has no tokenizer, or its model or pre-tokenizer is not supported.
    """
    data = _Metadata(file)
    if not data.tokens:
        raise ConfigError(f"{file.path} holds no tokenizer: name one with --tokenizer")
    kind = data.read("model")
    try:
        if kind == "gpt2":
            backend, strips = _byte_level_bpe(data), False
        elif kind == "llama":
            backend, strips = _sentencepiece(data)
        else:
            raise ConfigError(f"tokenizer model {kind!r} is not supported; supported: gpt2, llama")
    except Exception as error:  # `tokenizers` raises plain Exception
        raise ConfigError(
            f"{file.path}: {error}; name another tokenizer with --tokenizer"
        ) from None
    traits = TokenizerTraits(
        vocab_size=len(data.tokens),
        byte_level=kind == "gpt2",
        strips_leading_space=strips,
        special_ids=frozenset(data.special_ids()),
        special_tokens=data.named,
        eos_token_ids=data.end_ids(),
        chat_template=file.metadata.get("tokenizer.chat_template"),
    )
    return Tokenizer(backend, traits)


def _byte_level_bpe(data: _Metadata) -> TokenizerBackend:
    pre = data.read("pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"pre-tokenizer {pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    tokens = data.tokens
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (left, right) for left, _, right in (m.partition(" ") for m in data.read("merges", []))
    ]
    # Llama 3 keeps a word that is a token whole, even if the merges would not produce it.
    fast = FastTokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        first: Any = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(_WORDS[pre]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    fast.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    if pre == "qwen2":
        fast.normalizer = normalizers.NFC()
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(tokens[i], special=True) for i in data.special_ids()])
    fast.add_tokens([AddedToken(tokens[i], normalized=False) for i in data.of_type(_USER_DEFINED)])
    adds_bos = data.read("add_bos_token", pre == "llama-bpe")
    adds_eos = data.read("add_eos_token", False)
    set_bos_eos(
        fast,
        data.named.get("bos_token") if adds_bos else None,
        data.named.get("eos_token") if adds_eos else None,
    )
    return FastBackend(fast)


def _sentencepiece(data: _Metadata) -> tuple[SentencePieceBackend, bool]:
    """Returns the backend, and True if it encodes a text as if a space stood before it."""
    proto = make_proto(
        data.tokens,
        data.read("scores", [0.0] * len(data.tokens)),
        data.types,
        special=data.named,
        add_prefix_space=bool(data.read("add_space_prefix", True)),
    )
    backend = SentencePieceBackend(
        proto,
        added={},
        named=[AddedToken(data.tokens[i], special=True) for i in data.special_ids()],
        add_bos=bool(data.read("add_bos_token", True)),
        add_eos=bool(data.read("add_eos_token", False)),
        legacy=True,
    )
    return backend, backend.adds_prefix_space
