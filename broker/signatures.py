"""Signatures by the Standard Webhooks specification, 1.0.0 (https://www.standardwebhooks.com), of the kind v1.

A receiver knows by them who sent a message, and that nobody changed it or sends it again later: what is signed is the
message's id, the time of this attempt and the body. A secret is shown as `whsec_` and base64. A header carries one
signature for each secret that is valid now, so that a receiver may hold the old one or the new.
"""

from __future__ import annotations

import hmac
import secrets
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable

PREFIX = "whsec_"
# The specification asks for 24 to 64.
SECRET_BYTES = 32


def new_secret() -> bytes:
    """Return a secret that nobody has had before."""
    return secrets.token_bytes(SECRET_BYTES)


def secret_text(secret: bytes) -> str:
    """Return a secret as it is shown."""
    return PREFIX + b2a_base64(secret, newline=False).decode()


def secret_bytes(text: str) -> bytes:
    """Return the secret that is shown so. Raises ValueError where it is none."""
    if not text.startswith(PREFIX):
        raise ValueError(f"a secret begins with {PREFIX}")
    return a2b_base64(text.removeprefix(PREFIX), strict_mode=True)


def sign(message_id: str, timestamp: int, body: bytes, valid: Iterable[bytes]) -> str:
    """Return the value of the header `webhook-signature`; `timestamp` in seconds since 1970, newest secret first."""
    signed = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
    digests = (hmac.digest(secret, signed, "sha256") for secret in valid)
    return " ".join("v1," + b2a_base64(digest, newline=False).decode() for digest in digests)
