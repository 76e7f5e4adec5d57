"""The checker finds what it is for, in made-up histories."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from history import (
    READ_WITHIN_SECONDS,
    Acknowledged,
    Answered,
    Answering,
    AnyEvent,
    Attempted,
    Deleted,
    Deleting,
    Delivered,
    Extended,
    Extending,
    Failed,
    Pushed,
    Refused,
    check,
    check_pushes,
    read,
    together,
    wanted,
)

MIDNIGHT = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = 10.0


def sent(*values: str, at: float = 0, ids: str | None = None) -> Iterator[AnyEvent]:
    """A producer sends values, and is told; the ids are the values."""
    yield Attempted(at=at, values=list(values))
    yield Acknowledged(at=at, values=list(values), message_ids=list(ids or values))


def delivered(value: str, receipt: str, *, at: float, message_id: str | None = None) -> AnyEvent:
    """A consumer is given a message, on the database's clock at the same time."""
    visible_at = MIDNIGHT + timedelta(seconds=at + LEASE)
    return Delivered(
        at=at, asked_at=at - 0.5, value=value, message_id=message_id or value, receipt=receipt,
        visible_at=visible_at, visibility_timeout=LEASE,
    )  # fmt: skip


def deleted(receipt: str, *, at: float, result: str = "deleted") -> Iterator[AnyEvent]:
    yield Deleting(at=at, receipt=receipt)
    yield Deleted(at=at, receipt=receipt, result=result)


def extended(receipt: str, *, at: float, seconds: float) -> Iterator[AnyEvent]:
    yield Extending(at=at, receipt=receipt, visibility_timeout=seconds)
    yield Extended(at=at, receipt=receipt, visible_at=MIDNIGHT + timedelta(seconds=at + seconds))


def all_of(*parts: Iterator[AnyEvent] | AnyEvent) -> list[AnyEvent]:
    return list(itertools.chain.from_iterable([part] if isinstance(part, msgspec.Struct) else part for part in parts))


def test_what_came_and_went_once_is_in_order() -> None:
    verdict = check(all_of(sent("x", "y"), delivered("x", "r", at=1), delivered("y", "s", at=1), deleted("r", at=2)))
    assert verdict.violations == {}
    assert (verdict.attempted, verdict.acknowledged, verdict.deliveries, verdict.duplicated.total()) == (2, 2, 2, 0)


@pytest.mark.parametrize(
    ("violation", "history"),
    [
        ("lost", all_of(sent("x"))),
        ("unexpected", [delivered("x", "r", at=1)]),
        ("unexpected", [Attempted(at=0, values=["x"]), Refused(at=0, values=["x"]), delivered("x", "r", at=1)]),
        ("stored_twice", all_of(sent("x"), delivered("x", "r", at=1), delivered("x", "s", at=1, message_id="y"))),
        ("stored_twice", all_of(sent("x"), sent("x", ids="y"), delivered("x", "r", at=1))),
        ("leased_twice", all_of(sent("x"), delivered("x", "r", at=1), delivered("x", "s", at=1 + LEASE - 0.1))),
        (
            "leased_twice",
            all_of(
                sent("x"),
                delivered("x", "r", at=1),
                extended("r", at=5, seconds=LEASE),
                delivered("x", "s", at=2 + LEASE),
            ),
        ),
        (
            "redelivered_after_delete",
            all_of(sent("x"), delivered("x", "r", at=1), deleted("r", at=2), delivered("x", "s", at=2 + LEASE)),
        ),
        (
            "redelivered_after_delete",  # although the delivery of the deleted lease was heard of first
            all_of(sent("x"), delivered("x", "r", at=1), delivered("x", "s", at=2 + LEASE), deleted("r", at=30)),
        ),
        (
            "redelivered_after_delete",
            all_of(
                sent("x"),
                delivered("x", "r", at=1),
                deleted("r", at=2, result="gone"),
                delivered("x", "s", at=2 + LEASE),
            ),
        ),
    ],
)
def test_a_broken_promise_is_found(violation: str, history: list[AnyEvent]) -> None:
    assert list(check(history).violations) == [violation]


@pytest.mark.parametrize(
    ("reason", "holder"),
    [
        ("its consumer did not delete it", []),
        ("its delete had no known outcome", [Deleting(at=2, receipt="r")]),
        ("its delete came too late", list(deleted("r", at=40, result="lease_lost"))),
    ],
)
def test_what_is_handed_out_again_after_its_lease_is_explained(reason: str, holder: list[AnyEvent]) -> None:
    again = delivered("x", "s", at=1 + LEASE)
    verdict = check(all_of(sent("x"), delivered("x", "r", at=1), iter(holder), again, deleted("s", at=30)))
    assert verdict.violations == {}
    assert verdict.duplicated == {reason: 1}
    assert verdict.duplicated_share == 0.5


def test_what_its_consumer_gave_back_is_no_duplicate() -> None:
    for giving in (list(extended("r", at=2, seconds=0)), [Extending(at=2, receipt="r", visibility_timeout=0)]):
        verdict = check(all_of(sent("x"), delivered("x", "r", at=1), iter(giving), delivered("x", "s", at=2)))
        assert verdict.violations == {}
        assert (verdict.given_back, verdict.duplicated.total()) == (1, 0)


def test_an_unknown_outcome_counts_neither_as_done_nor_as_not_done() -> None:
    unheard: list[AnyEvent] = [
        Attempted(at=0, values=["x", "y"]),
        Failed(at=1, method="enqueue", outcome="unknown", type="t", seconds=1),
    ]
    verdict = check([*unheard, delivered("x", "r", at=1)])
    assert verdict.violations == {}
    assert verdict.recovered == 1
    assert verdict.failures == {"enqueue t unknown": 1}


def test_another_consumer_may_have_deleted_what_is_gone() -> None:
    late = deleted("r", at=40, result="gone")
    verdict = check(all_of(sent("x"), delivered("x", "r", at=1), delivered("x", "s", at=20), deleted("s", at=21), late))
    assert verdict.violations == {}


def copied(value: str, receipt: str, *, at: float, copy: str, published_id: str | None = None) -> AnyEvent:
    """A consumer is given a copy of what was published."""
    message = delivered(value, receipt, at=at, message_id=copy)
    return msgspec.structs.replace(message, published_id=published_id or value)


def test_what_was_published_is_judged_for_each_subscription_by_what_it_wants() -> None:
    published = all_of(sent("1-red"), sent("2-blue"))
    everything = [copied("1-red", "r", at=1, copy="a"), copied("2-blue", "s", at=1, copy="b")]
    assert check([*wanted(published, ""), *everything]).violations == {}
    assert check([*wanted(published, "red"), *everything[:1]]).violations == {}
    assert check([*wanted(published, "red"), *everything]).violations == {"unexpected": ["2-blue"]}
    assert check([*wanted(published, ""), *everything[:1]]).violations == {"lost": ["2-blue"]}


def test_a_copy_too_many_and_one_of_another_message_are_found() -> None:
    for second in (copied("x", "s", at=1, copy="b"), copied("x", "s", at=99, copy="a", published_id="y")):
        verdict = check(all_of(sent("x"), copied("x", "r", at=1, copy="a"), second))
        assert verdict.violations == {"stored_twice": ["x"]}


def pushed(value: str, push: str, *, at: float, is_taken: bool = True, is_told: bool = True) -> Iterator[AnyEvent]:
    """A receiver is sent a message, and answers."""
    yield Pushed(at=at, push=push, value=value, message_id=f"copy of {value}")
    yield Answering(at=at, push=push, is_taken=is_taken)
    if is_told:
        yield Answered(at=at, push=push)


@pytest.mark.parametrize(
    ("violation", "history"),
    [
        ("lost", all_of(sent("x"))),
        ("lost", all_of(sent("x"), pushed("x", "1", at=1, is_taken=False))),
        ("unexpected", list(pushed("x", "1", at=1))),
        ("unexpected", [Attempted(at=0, values=["x"]), Refused(at=0, values=["x"]), *pushed("x", "1", at=1)]),
        (
            "stored_twice",
            all_of(
                sent("x"),
                pushed("x", "1", at=1, is_taken=False),
                Pushed(at=2, push="2", value="x", message_id="y"),
                Answering(at=2, push="2", is_taken=True),
            ),
        ),
        ("leased_twice", all_of(sent("x"), pushed("x", "1", at=1), pushed("x", "2", at=0.5 + LEASE))),
        (
            "leased_twice",  # the first receiver was killed, but long after
            all_of(
                sent("x"),
                sent("y"),
                pushed("x", "one-1", at=1),
                pushed("x", "two-1", at=0.5 + LEASE),
                pushed("y", "one-2", at=1 + READ_WITHIN_SECONDS),
                pushed("y", "two-2", at=99, is_taken=False),
            ),
        ),
    ],
)
def test_a_promise_that_a_push_has_broken_is_found(violation: str, history: list[AnyEvent]) -> None:
    assert list(check_pushes(history, LEASE, until=100).violations) == [violation]


def test_a_push_that_is_repeated_is_explained() -> None:
    refused = all_of(sent("x"), pushed("x", "1", at=1, is_taken=False), pushed("x", "2", at=2))
    not_heard_of = all_of(sent("x"), pushed("x", "1", at=1, is_told=False), pushed("x", "2", at=2))
    after_its_lease = all_of(sent("x"), pushed("x", "1", at=1), pushed("x", "2", at=1 + LEASE))
    killed_with_its_answer = all_of(sent("x"), pushed("x", "one-1", at=1), pushed("x", "two-1", at=2))
    at_the_end = all_of(sent("x"), pushed("x", "1", at=1), pushed("x", "2", at=3))
    for history, until, duplicated in (
        (refused, 100, 0),
        (not_heard_of, 100, 1),
        (after_its_lease, 100, 1),
        (killed_with_its_answer, 100, 1),
        (at_the_end, 2, 1),
    ):
        verdict = check_pushes(history, LEASE, until)
        assert verdict.violations == {}
        assert (verdict.duplicated.total(), verdict.given_back) == (duplicated, 1 - duplicated)
        assert (verdict.acknowledged, verdict.deliveries) == (1, 2)


def test_several_queues_together_say_which_has_lost_something() -> None:
    good, bad = check(all_of(sent("x"), delivered("x", "r", at=1))), check(all_of(sent("y")))
    total = together({"good": good, "bad": bad})
    assert total.violations == {"lost": ["bad: y"]}
    assert (total.acknowledged, total.deliveries) == (2, 1)


def test_a_history_is_read_as_it_was_written_but_for_the_line_that_was_cut_short() -> None:
    events = all_of(sent("x"), delivered("x", "r", at=1), extended("r", at=2, seconds=1), deleted("r", at=3))
    lines = [msgspec.json.encode(event) for event in events]
    assert read(b"\n".join(lines) + b"\n" + lines[0][:10]) == events
