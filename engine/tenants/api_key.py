"""API keys: how they are made and hashed."""

import hashlib
import secrets

PREFIX = "lpx-"
MIN_KEY_CHARS = 20
MAX_KEY_CHARS = 512


def new_key() -> str:
    """Returns a fresh key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def key_hash(key: str) -> str:
    """Returns the SHA-256 of a key, in hex.

    A key is random, so that nobody can guess it from its hash and no slow hash is needed.
    """
    return hashlib.sha256(key.encode()).hexdigest()


def key_problem(key: str) -> str:
    """Returns why a text cannot be a key, "" if it can."""
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS:
        return f"a key has {MIN_KEY_CHARS} to {MAX_KEY_CHARS} characters, not {len(key)}"
    if not key.isascii() or not key.isprintable() or " " in key:
        return "a key has printable ASCII characters without spaces"
    return ""
