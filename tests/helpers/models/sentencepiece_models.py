"""A tiny SentencePiece model, trained in-process the way Llama's was."""

import io
from functools import cache

import sentencepiece

_CORPUS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "    def forward(self, x):  return x  # indented, with  runs   of spaces",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 42 1984 2026. It's fine, isn't it?",
    "Grüße aus München! Привет, мир!",
)


@cache
def train_sentencepiece(vocab_size: int = 420) -> bytes:
    """Returns a serialized BPE model with byte fallback: <unk> 0, <s> 1, </s> 2, then 256 bytes."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS * 20),
        model_writer=out,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    return out.getvalue()
