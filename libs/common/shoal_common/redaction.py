"""Secrets of this process, which are taken out of what it logs, sends, traces and prints.

Text of libraries, tools and peers may hold a secret that was given to them: a header that a client refuses to send, a
URL with a password. Whatever text leaves goes through `redact`: messages of errors, log lines, and spans.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

MASK = "[secret]"
_MIN_CHARACTERS = 6
"""Shorter ones are ordinary words: masking them would hide what a message says."""
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
"""Variables with the hub's token: only the fetcher gets them (I12)."""
_VARIABLES = (*HUB_TOKENS, "SHOAL_SECRET", "SHOAL_API_KEY")
_URL_VARIABLES = ("SHOAL_NATS", "HF_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_secrets: dict[str, None] = {}


def remember_secret(secret: str) -> None:
    """Mask this text from now on, without the spaces around it."""
    if len(stripped := secret.strip()) >= _MIN_CHARACTERS:
        _secrets[stripped] = None


def remember_secrets(environ: Mapping[str, str]) -> None:
    """Mask the secrets that an environment holds: tokens, and the credentials in URLs."""
    for name in _VARIABLES:
        remember_secret(environ.get(name, ""))
    for name in _URL_VARIABLES:
        for url in environ.get(name, "").split(","):
            _remember_credentials(url.strip())


def redact(text: str) -> str:
    """Return text with every known secret masked."""
    for secret in _secrets:
        if secret in text:
            text = text.replace(secret, MASK)
    return text


def _remember_credentials(url: str) -> None:
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
    except ValueError:
        return
    # A token stands where a user does; beside a password it is a name, which is no secret.
    secret = parts.username if parts.password is None else parts.password
    if secret:
        remember_secret(secret)
        remember_secret(unquote(secret))
