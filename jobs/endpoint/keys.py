"""Who may ask: API keys, known by their digests only, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path

from jobs.endpoint.config import AccessSection
from pipeline.settings_file import JobError

MIN_KEY_CHARACTERS = 16


def read_key_digests(access: AccessSection) -> tuple[str, ...]:
    """The SHA-256 digests, in hex, of all keys that a file or a variable holds; JobError if one names none."""
    texts = []
    if access.api_key_file is not None:
        try:
            lines = Path(access.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise JobError(f"access.api_key_file: {access.api_key_file} cannot be read: {error}") from error
        texts.append((f"access.api_key_file={access.api_key_file}", [line.split("#")[0].strip() for line in lines]))
    if access.api_key_env is not None:
        keys = os.environ.get(access.api_key_env, "").split(",")
        texts.append((f"access.api_key_env={access.api_key_env}", [key.strip() for key in keys]))
    digests = []
    for source, keys in texts:
        found = [_digest_of(key, source) for key in keys if key]
        if not found:
            raise JobError(f"{source} holds no key; put one there, or remove the setting")
        digests += found
    return tuple(dict.fromkeys(digests))


def is_known(key: str, digests: tuple[str, ...]) -> bool:
    """Whether a key is one of those; takes as long for any wrong one."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    found = False
    for known in digests:
        found |= hmac.compare_digest(digest, known)
    return found


def _digest_of(key: str, source: str) -> str:
    if key.startswith("sha256:"):
        digest = key.removeprefix("sha256:").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise JobError(f"{source}: what stands behind sha256: should be 64 hexadecimal digits")
        return digest
    if len(key) < MIN_KEY_CHARACTERS:
        raise JobError(f"{source}: a key has {len(key)} characters, and at least {MIN_KEY_CHARACTERS} are needed")
    return hashlib.sha256(key.encode()).hexdigest()
