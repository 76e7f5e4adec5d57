"""What a process knows of an endpoint, and what it makes of answers and of what the database says."""

from __future__ import annotations

import pytest
from yarl import URL

from broker.endpoints import FAILURES, FIRST_AT_ONCE, Endpoint
from broker.receivers import Answer, Outcome
from broker.storage.subscriptions import PushTarget

TARGET = PushTarget(1, "t", "a", "push.t.a", "https://receiver.test/", False, 0.0, 10, [b"secret"])
REFUSED = Answer(Outcome.REFUSED)


@pytest.fixture
def endpoint() -> Endpoint:
    """An endpoint that nothing is known of."""
    return Endpoint(TARGET, URL(TARGET.url), most_at_once=32)


def test_each_message_that_is_taken_is_one_more_at_a_time_up_to_the_limit(endpoint: Endpoint) -> None:
    assert endpoint.room == FIRST_AT_ONCE
    for taken in range(1, 50):
        assert not endpoint.has_taken_one()
        assert endpoint.room == min(FIRST_AT_ONCE + taken, 32)


@pytest.mark.parametrize(
    "answer",
    [Answer(Outcome.TIMEOUT), Answer(Outcome.UNANSWERED), Answer(Outcome.FORBIDDEN), Answer(Outcome.REFUSED, 1.0)],
)
def test_who_does_not_answer_or_is_busy_gets_half_as_many_and_one_at_least(endpoint: Endpoint, answer: Answer) -> None:
    endpoint.at_once = 32
    found = []
    for _ in range(7):
        endpoint.has_failed(answer)
        found.append(endpoint.room)
    assert found == [16, 8, 4, 2, 1, 1, 1]


def test_who_answers_that_it_does_not_take_this_one_gets_as_many_as_before(endpoint: Endpoint) -> None:
    endpoint.at_once = 32
    for _ in range(20):
        endpoint.has_failed(REFUSED)
    assert endpoint.room == 32


def test_it_fails_after_so_many_failures_in_a_row_and_no_longer_after_a_success(endpoint: Endpoint) -> None:
    for _ in range(3):
        assert [endpoint.has_failed(REFUSED) for _ in range(FAILURES - 1)] == [False] * (FAILURES - 1)
        assert not endpoint.has_taken_one()
    assert [endpoint.has_failed(REFUSED) for _ in range(FAILURES + 2)].index(True) == FAILURES - 1
    assert endpoint.is_failing
    assert not endpoint.may_be_sent_messages(0.0)
    assert endpoint.has_taken_one()
    assert not endpoint.has_taken_one()
    assert endpoint.may_be_sent_messages(0.0)


def test_a_pause_is_only_lengthened_and_over_when_its_time_is(endpoint: Endpoint) -> None:
    assert endpoint.pause(100.0)
    assert not endpoint.pause(50.0)
    assert not endpoint.pause(100.5), "that is the same one"
    assert not endpoint.may_be_sent_messages(99.9)
    assert endpoint.may_be_sent_messages(100.0)
    assert endpoint.pause(200.0)
    assert not endpoint.may_be_sent_messages(100.0)


def test_what_the_database_says_counts_unless_it_was_asked_before_it_knew(endpoint: Endpoint) -> None:
    failing = TARGET._replace(is_failing=True, paused_for=10.0)
    endpoint.learn(failing, read_at=100.0)
    assert (endpoint.is_failing, endpoint.paused_until) == (True, 110.0)
    endpoint.has_taken_one()
    endpoint.pending_notes = 1
    endpoint.learn(failing, read_at=101.0)
    assert not endpoint.is_failing, "its success is just being noted"
    endpoint.pending_notes, endpoint.noted_at = 0, 102.0
    endpoint.learn(failing, read_at=101.0)
    assert not endpoint.is_failing, "this was read before"
    endpoint.learn(failing, read_at=103.0)
    assert endpoint.is_failing, "it failed anew, at another broker"
    endpoint.learn(TARGET, read_at=104.0)
    assert (endpoint.is_failing, endpoint.paused_until, endpoint.failures_in_a_row) == (False, 0.0, 0)


def test_a_new_secret_counts_at_once(endpoint: Endpoint) -> None:
    endpoint.pending_notes = 1
    endpoint.learn(TARGET._replace(secrets=[b"new", b"secret"]), read_at=1.0)
    assert endpoint.target.secrets == [b"new", b"secret"]
