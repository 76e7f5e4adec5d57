"""What receivers check: signatures, against the specification's own library."""

from __future__ import annotations

import time
from base64 import b64encode

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from broker import signatures

BODY = '{"order": 1.0, "text": "\\u0000é"}'.encode()


def headers(*valid: bytes, message_id: str = "000000000000002a", body: bytes = BODY, age: int = 0) -> dict[str, str]:
    """Return what a receiver gets with a body."""
    timestamp = int(time.time()) - age
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signatures.sign(message_id, timestamp, body, valid),
    }


def test_the_specification_s_library_takes_what_was_signed() -> None:
    secret = signatures.new_secret()
    webhook = Webhook(signatures.secret_text(secret))
    assert webhook.verify(BODY, headers(secret)) == {"order": 1.0, "text": "\0é"}


def test_the_example_of_the_specification_has_the_signature_that_it_prints() -> None:
    secret = signatures.secret_bytes("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    signed = signatures.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body, [secret])
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("change", ["webhook-id", "webhook-timestamp", "body", "secret"])
def test_whatever_is_changed_on_the_way_is_noticed(change: str) -> None:
    secret = signatures.new_secret()
    sent = headers(secret)
    body = BODY
    if change == "body":
        body += b" "
    elif change == "secret":
        secret = signatures.new_secret()
    elif change == "webhook-timestamp":
        sent[change] = str(int(sent[change]) + 1)
    else:
        sent[change] += "0"
    with pytest.raises(WebhookVerificationError):
        Webhook(signatures.secret_text(secret)).verify(body, sent)


def test_while_two_secrets_are_valid_a_receiver_may_hold_either() -> None:
    new, old = signatures.new_secret(), signatures.new_secret()
    sent = headers(new, old)
    assert sent["webhook-signature"].count("v1,") == 2
    for secret in (new, old):
        Webhook(signatures.secret_text(secret)).verify(BODY, sent)
    with pytest.raises(WebhookVerificationError):
        Webhook(signatures.secret_text(old)).verify(BODY, headers(new))


def test_a_secret_is_32_random_bytes_and_shown_as_the_specification_asks() -> None:
    secrets = [signatures.new_secret() for _ in range(100)]
    assert len(set(secrets)) == 100
    for secret in secrets:
        assert len(secret) == 32
        assert signatures.secret_text(secret) == "whsec_" + b64encode(secret).decode()
        assert signatures.secret_bytes(signatures.secret_text(secret)) == secret


@pytest.mark.parametrize("text", ["", "whsec", "AAAA", "whsec_A", "whsec_AA=A", "WHSEC_AAAA", "whsec_A A A"])
def test_what_is_no_secret_is_not_taken_for_one(text: str) -> None:
    with pytest.raises(ValueError):
        signatures.secret_bytes(text)
