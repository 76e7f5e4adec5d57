"""What `wonderq doctor` finds: what is so, how bad that is, and what to do. Here: what the broker itself has told.

Pure functions from facts to findings; `doctor` gathers the facts. A finding needs action where a person has to do
something about it, now or this week. All else that is worth knowing is a note.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from broker import __version__
from broker.cli.output import count_of, duration

Severity = Literal["ok", "note", "needs_action"]

# A difference between two clocks. Receivers of pushes take signatures that are five minutes old at most.
CLOCK_NOTE_SECONDS, CLOCK_ACTION_SECONDS = 2.0, 60.0
# How long a message may have been ready before somebody asks whether there is a consumer.
READY_NOTE_SECONDS, READY_ACTION_SECONDS = 600.0, 3_600.0
NEARLY_FULL = 0.9
# Of one kind, so that ten thousand queues without a consumer are no ten thousand lines.
SHOWN = 20


@dataclass(frozen=True)
class Finding:
    """Something that was looked at: `about` what, how bad it is, what is so, and what to do about it."""

    severity: Severity
    about: str
    what: str
    to_do: str | None = None


@dataclass
class BrokerFacts:
    """What the broker told. `server` is None where it did not; then `refusal` says why."""

    url: str
    livez: Mapping[str, Any] | None = None
    silence: str = ""
    clock_difference: float | None = None
    readyz: Mapping[str, Any] | None = None
    server: Mapping[str, Any] | None = None
    refusal: str = ""
    lets_everybody_in: bool = False
    has_token: bool = False
    queues: Sequence[Mapping[str, Any]] = ()
    subscriptions: Sequence[Mapping[str, Any]] = ()
    unanswered: list[str] = field(default_factory=list)


def broker_findings(facts: BrokerFacts) -> list[Finding]:
    """Return what the answers of a broker mean."""
    if facts.livez is None:
        return [
            Finding(
                "needs_action",
                "broker",
                f"No broker answers at {facts.url}: {facts.silence}",
                "Start one with wonderq serve, or name another by --url or BROKER_URL.",
            )
        ]
    found = [Finding("ok", "broker", f"{facts.url} answers, version {facts.livez['version']}"), *readiness(facts)]
    found += [*versions(facts), *settings(facts), *clock("broker", facts.clock_difference)]
    found += [Finding("note", "broker", f"Not looked at: {what}", "Ask again with a token that may.") for what in
              facts.unanswered]  # fmt: skip
    return [*found, *queue_findings(facts.queues), *subscription_findings(facts.subscriptions)]


def readiness(facts: BrokerFacts) -> Iterable[Finding]:
    """Whether it serves."""
    ready = facts.readyz or {}
    if "error" in ready:
        yield Finding(
            "needs_action", "broker", f"It is not ready: {ready['error']['message']}", "See below for its database."
        )
    elif ready.get("writes_refused"):
        yield Finding(
            "needs_action",
            "broker",
            f"It serves reads alone; writes are refused: {ready['writes_refused']}",
            "See docs/reliability.md, the circuit breaker; writes go on by themselves once that is over.",
        )
    elif ready:
        yield Finding("ok", "broker", "It is ready")
    if ready.get("durability") == "at_risk":
        yield Finding(
            "needs_action",
            "durability",
            "Acknowledged messages can be lost in a crash, and this broker was told to allow that (--allow-data-loss)",
            "Switch fsync, full_page_writes and synchronous_commit on in PostgreSQL, and leave --allow-data-loss out.",
        )


def versions(facts: BrokerFacts) -> Iterable[Finding]:
    """Whether this program and the broker belong together."""
    assert facts.livez is not None, "it answered"
    theirs = facts.livez["version"]
    if theirs != __version__:
        yield Finding(
            "note",
            "versions",
            f"The broker is {theirs} and this wonderq is {__version__}",
            "Install the version of the broker here, so that commands and methods fit.",
        )


def settings(facts: BrokerFacts) -> Iterable[Finding]:
    """Who may call, and what limits there are."""
    is_private = is_loopback(facts.url)
    if facts.lets_everybody_in and not is_private:
        yield Finding(
            "needs_action",
            "settings",
            "Whoever reaches the broker may do everything: it asks for no token, and it is not on loopback",
            "Make a token (wonderq token create NAME --admin --manage '*') and serve with --auth required.",
        )
    elif facts.lets_everybody_in:
        yield Finding("ok", "settings", "It asks for no token, and was reached on loopback")
    elif facts.server is not None:
        yield Finding("ok", "settings", "It asks for tokens")
    if facts.has_token and not is_private and facts.url.startswith("http:"):
        yield Finding(
            "note",
            "settings",
            "The token goes to the broker over plain http, where everybody on the way can read it",
            "Give the broker a certificate (--tls-certificate, --tls-key), or put it behind a proxy that has one.",
        )
    if facts.server is None:
        yield Finding(
            "note",
            "settings",
            f"The broker does not say how it is set: {facts.refusal}",
            "Ask with a token that has --admin, in BROKER_TOKEN.",
        )
        return
    connections = facts.server["limits"]["database_connections"]
    said = f"--processes {facts.server['processes']}, each with --database-connections {connections}"
    yield Finding("ok", "settings", f"{said}; wonderq call get_server shows all limits")


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine and to no other."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def clock(whose: str, difference: float | None) -> Iterable[Finding]:
    """Whether a clock agrees with that of this machine; positive: it is ahead."""
    if difference is None:
        return
    apart = abs(difference)
    where = "ahead of" if difference > 0 else "behind"
    if apart < CLOCK_NOTE_SECONDS:
        yield Finding("ok", "clock", f"The clock of the {whose} agrees with this machine's")
        return
    yield Finding(
        "needs_action" if apart >= CLOCK_ACTION_SECONDS else "note",
        "clock",
        f"The clock of the {whose} is {duration(apart)} {where} this machine's",
        "Let both be set by NTP (timedatectl shows it). Delays and leases go by the database's clock; signatures and"
        " tokens that expire go wrong where clocks differ.",
    )


def queue_findings(queues: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What the counts and settings of queues say."""
    targets = {each["dead_letter_queue"] for each in queues} - {None}
    found = [finding for queue in queues for finding in findings_of_queue(queue, is_target=queue["queue"] in targets)]
    shortened = shorten(found)
    if queues and not any(each.severity == "needs_action" for each in found):
        shortened.insert(0, Finding("ok", "queues", f"{count_of(len(queues), 'queue')}, and none needs action"))
    return shortened


def findings_of_queue(queue: Mapping[str, Any], *, is_target: bool) -> Iterable[Finding]:
    """What one queue says; `is_target`: others send their dead letters there."""
    name, counts, age = queue["queue"], queue["counts"], queue["oldest_ready_age"]
    if is_target and counts["total"]:
        yield Finding(
            "needs_action",
            "dead letters",
            f"{name} has {count_of(counts['total'], 'dead letter')}",
            f"Look (wonderq peek {name}), mend the consumer, then wonderq redrive {name}; or wonderq purge {name}.",
        )
    if queue["max_receives"] is not None and queue["dead_letter_queue"] is None:
        yield Finding(
            "note",
            "dead letters",
            f"What fails {queue['max_receives']} times in {name} is dropped",
            f"To keep it name a queue for it: wonderq call update_queue --queue {name} --dead-letter-queue NAME",
        )
    if queue["paused"] and counts["total"]:
        yield Finding(
            "note",
            "queues",
            f"{name} is paused, and has {count_of(counts['total'], 'message')}",
            f"To go on: wonderq call update_queue --queue {name} --paused false",
        )
    most = queue["max_messages"]
    if most is not None and counts["total"] >= NEARLY_FULL * most:
        is_full = counts["total"] >= most
        yield Finding(
            "needs_action" if is_full else "note",
            "queues",
            f"{name} is {'full' if is_full else 'nearly full'}: {counts['total']:,} of {most:,} messages",
            "Add consumers, or raise max_messages (update_queue). Who sends to a full queue gets queue_full.",
        )
    if age is not None and age >= READY_NOTE_SECONDS and not is_target and not queue["paused"]:
        yield Finding(
            "needs_action" if age >= READY_ACTION_SECONDS else "note",
            "queues",
            f"The oldest message of {name} has been ready for {duration(age)}",
            "Is there a consumer, and does it keep up? Start more of them.",
        )


def subscription_findings(subscriptions: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What the states of subscriptions say."""
    found = []
    for each in subscriptions:
        if each["state"] == "ended":
            what = f"The endpoint of {each['name']} (topic {each['topic']}) wants no more messages, or is gone"
            to_do = (
                f"wonderq call unsubscribe --subscription-id {each['subscription_id']}; subscribe anew if it is back."
            )
            found.append(Finding("needs_action", "subscriptions", what, to_do))
        elif each["state"] == "failing":
            what = f"The endpoint of {each['name']} (topic {each['topic']}) takes no messages: {each['url']}"
            to_do = "Look at that server's log. Once it answers 2xx again, what waits for it is pushed."
            found.append(Finding("needs_action", "subscriptions", what, to_do))
    if subscriptions and not found:
        found.append(Finding("ok", "subscriptions", f"{count_of(len(subscriptions), 'subscription')}, all active"))
    return shorten(found)


def shorten(found: list[Finding]) -> list[Finding]:
    """Return the worst of many findings, and say how many more there are of each kind."""
    ordered = sorted(found, key=lambda each: each.severity != "needs_action")
    left = ordered[SHOWN:]
    more = [
        Finding(severity, each, f"and {count} more of the same kind", "See wonderq queues, wonderq topics.")
        for severity, each in sorted({(one.severity, one.about) for one in left})
        if (count := sum((one.severity, one.about) == (severity, each) for one in left))
    ]
    return [*ordered[:SHOWN], *more]
