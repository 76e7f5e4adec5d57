"""What /metrics says, and that it can be read by those who read it."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest, values
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from broker import __version__, gauges
from broker.gauges import with_others
from broker.histograms import LateHistogram
from broker.metrics import Metrics, share_metrics
from broker.model import Counts
from broker.storage import calls as calls_module
from broker.storage.database import Connection
from conftest import Broker, StartBroker
from outside import eventually, without_database

Shown = dict[str, dict[tuple[tuple[str, str], ...], float]]


def promtool() -> str:
    """Return where promtool is, which Debian's package `prometheus` brings."""
    found = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if not found:
        pytest.skip("promtool is not installed")
    return found


def samples_of(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        yield from family.samples


def read(text: str) -> Shown:
    """Return every value by name and labels."""
    found: Shown = {}
    for sample in samples_of(text):
        found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def text_of(broker: Broker) -> str:
    async with broker.http.get(f"{broker.url}/metrics") as response:
        assert response.status == 200
        return await response.text()


async def shown_by(broker: Broker) -> Shown:
    return read(await text_of(broker))


async def make_queues(connection: Connection, how_many: int) -> None:
    await connection.execute(
        "INSERT INTO broker.queues (name) SELECT 'q' || lpad(n::text, 5, '0') FROM generate_series(1, %s) n", [how_many]
    )


# ------------------------------------------------------------------------------------------------ the form


async def test_promtool_finds_nothing_wrong_with_what_a_used_broker_shows(broker: Broker) -> None:
    await broker.call("create_queue", queue="with.dots")
    await broker.call("enqueue_batch", messages=[{"body": 1}, {"body": 2}])
    (message, _) = (await broker.call("dequeue", max_messages=2))["messages"]
    await broker.call("delete", receipt=message["receipt"])
    await broker.error("enqueue", queue="nowhere", body=1)
    text = await text_of(broker)
    done = await asyncio.to_thread(
        subprocess.run, [promtool(), "check", "metrics"], input=text.encode(), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


async def test_every_family_has_its_help_and_type_and_no_value_twice(broker: Broker) -> None:
    text = await text_of(broker)
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.name.startswith("wonderq_"), family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert family.documentation.endswith("."), family.name
        assert len({(sample.name, *sorted(sample.labels.items())) for sample in family.samples}) == len(family.samples)


# ------------------------------------------------------------------------------------------------ queues


async def test_of_many_queues_the_first_are_shown_and_the_rest_together_as_other(
    broker: Broker, connection: Connection
) -> None:
    await make_queues(connection, gauges.MAX_QUEUES_SHOWN + 20)
    last = f"q{gauges.MAX_QUEUES_SHOWN + 20:05}"
    await broker.call("enqueue", queue="q00001", body=1)
    await broker.call("enqueue_batch", queue=last, messages=[{"body": 1}, {"body": 2}, {"body": 3, "delay": 100}])
    await broker.call("dequeue", queue=last)
    await connection.execute("UPDATE broker.messages SET visible_at = visible_at - interval '100 s' WHERE lane = 0")
    await connection.execute(
        "UPDATE broker.messages SET visible_at = visible_at - interval '5000 s'"
        " WHERE queue_id = (SELECT id FROM broker.queues WHERE name = 'q00001')"
    )
    shown = await shown_by(broker)
    messages = shown["wonderq_queue_messages"]
    assert len({dict(labels)["queue"] for labels in messages}) == gauges.MAX_QUEUES_SHOWN + 1
    others = {dict(labels)["status"]: value for labels, value in messages.items() if dict(labels)["queue"] == "other"}
    assert others == {"ready": 2, "delayed": 0, "leased": 1}
    assert messages[("queue", "q00001"), ("status", "ready")] == 1
    assert (("queue", last), ("status", "ready")) not in messages
    ages = shown["wonderq_queue_oldest_message_age_seconds"]
    assert 90 < ages[(("queue", "other"),)] < 200
    assert ages[(("queue", "q00001"),)] > 5000
    assert shown["wonderq_queues"] == {(): gauges.MAX_QUEUES_SHOWN + 21}


async def test_a_queue_called_other_is_itself_alone_and_one_of_the_rest_beside_it(
    broker: Broker, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.call("create_queue", queue="other")
    await broker.call("enqueue", queue="other", body=1)
    ready = (("queue", "other"), ("status", "ready"))
    assert (await shown_by(broker))["wonderq_queue_messages"][ready] == 1
    await broker.call("create_queue", queue="zzz")
    await broker.call("enqueue", queue="zzz", body=1)
    monkeypatch.setattr("broker.pages.MAX_QUEUES_SHOWN", 2)
    shown = (await shown_by(broker))["wonderq_queue_messages"]
    assert {dict(labels)["queue"] for labels in shown} == {"default", "other"}
    assert shown[ready] == 2


def test_the_rest_is_never_less_than_nothing() -> None:
    """What there is in all may be an estimate."""
    shown = {"a": (Counts(5, 0, 0, 5, exact=True), 1.0)}
    rest, age = with_others(shown, Counts(3, 2, 0, 5, exact=False), None)["other"]
    assert (rest.ready, rest.delayed, rest.leased, age) == (0, 2, 0, None)


# ------------------------------------------------------------------------------------------------ histograms


def test_a_late_histogram_says_what_prometheus_own_would() -> None:
    bounds = (0.001, 0.01, 1)
    observed = (0, 0.001, 0.0011, 0.01, 0.5, 1, 1.1, 1000, math.inf)
    late, own = CollectorRegistry(), CollectorRegistry()
    histogram = LateHistogram("h_seconds", "x.", bounds, late, "kind")
    for value in observed:
        histogram.observe(value, "a")
    histogram.settle()
    histogram.observe_all([0.5, 2.0], "b")
    histogram.settle()
    histogram.settle()

    expected = Histogram("h_seconds", "x.", ["kind"], buckets=bounds, registry=own)
    for value in observed:
        expected.labels("a").observe(value)
    for value in (0.5, 2.0):
        expected.labels("b").observe(value)
    assert read(generate_latest(late).decode()) == read(generate_latest(own).decode())


def test_late_histograms_of_several_processes_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    several = []
    for worker in (0, 1):
        share_metrics(tmp_path, worker)
        several.append(Metrics(tmp_path))
        several[-1].batch("dequeue", 3 + worker)
        several[-1].settle()
    shown = read(several[0].text().decode())
    assert shown["wonderq_call_messages_count"][(("method", "dequeue"),)] == 2
    assert shown["wonderq_call_messages_sum"][(("method", "dequeue"),)] == 7
    assert shown["wonderq_processes"][()] == 2


async def test_calls_say_how_many_messages_and_statements_how_many_calls_and_how_long(broker: Broker) -> None:
    began_at = time.perf_counter()
    await broker.call("enqueue_batch", messages=[{"body": n} for n in range(7)])
    await asyncio.gather(*(broker.call("enqueue", body=n) for n in range(3)))
    receipts = [each["receipt"] for each in (await broker.call("dequeue", max_messages=5))["messages"]]
    await broker.call("extend_visibility_batch", receipts=receipts[:3], visibility_timeout=60)
    await broker.call("delete_batch", receipts=receipts[:2])
    shown = await shown_by(broker)
    sums = {dict(labels)["method"]: value for labels, value in shown["wonderq_call_messages_sum"].items()}
    assert sums == {"enqueue_batch": 7, "dequeue": 5, "extend_visibility_batch": 3, "delete_batch": 2}
    carried = {dict(labels)["call"]: value for labels, value in shown["wonderq_statement_calls_sum"].items()}
    assert carried == {"enqueue": 4, "dequeue": 1, "extend_visibility": 1, "delete": 1}
    statements = shown["wonderq_statement_calls_count"]
    assert 1 < statements[(("call", "enqueue"),)] <= 4
    assert shown["wonderq_statement_seconds_count"] == statements
    assert 0 < sum(shown["wonderq_statement_seconds_sum"].values()) < time.perf_counter() - began_at


async def test_a_delete_says_how_long_the_message_was_leased(broker: Broker, connection: Connection) -> None:
    await broker.call("enqueue_batch", messages=[{"body": n} for n in range(3)])
    receipts = [each["receipt"] for each in (await broker.call("dequeue", max_messages=3))["messages"]]
    await connection.execute("UPDATE broker.messages SET first_received_at = first_received_at - interval '100 s'")
    # When its second lease began is not known.
    await connection.execute(
        "UPDATE broker.messages SET receive_count = 2 WHERE id = (SELECT min(id) FROM broker.messages)"
    )
    await broker.call("delete_batch", receipts=receipts)
    shown = await shown_by(broker)
    assert shown["wonderq_lease_age_seconds_count"][()] == 2
    assert 200 <= shown["wonderq_lease_age_seconds_sum"][()] < 300


async def test_one_in_so_many_deletes_is_asked_for_the_age(broker: Broker) -> None:
    for _ in range(calls_module.AGES_EVERY + 1):
        await broker.call("enqueue", body=1)
        (message,) = (await broker.call("dequeue"))["messages"]
        assert await broker.call("delete", receipt=message["receipt"]) == {"deleted": True}
    assert (await shown_by(broker))["wonderq_lease_age_seconds_count"][()] == 2


# ------------------------------------------------------------------------------------------------ what runs


async def test_limits_stand_beside_what_is_used_of_them(start_broker: StartBroker) -> None:
    broker: Broker = await start_broker(max_connections=123, database_connections=5)
    waiting = asyncio.create_task(broker.call("dequeue", wait=20))

    async def waits() -> bool:
        return (await shown_by(broker))["wonderq_waiting_consumers"][()] == 1

    await eventually(waits)
    shown = await shown_by(broker)
    limits = {dict(labels)["limit"]: value for labels, value in shown["wonderq_limit"].items()}
    assert (limits["max_connections"], limits["database_connections"]) == (123, 5)
    assert set(limits) >= {"max_calls", "max_calls_in_flight", "max_waiting_consumers", "webhook_total"}
    assert shown["wonderq_calls_in_flight"][()] == 1
    assert 1 <= shown["wonderq_database_connections"][()] <= 5
    assert 0 <= shown["wonderq_database_connections_busy"][()] <= 5
    assert shown["wonderq_calls_waiting"][()] == 0
    assert shown["wonderq_processes"][()] == 1
    await broker.call("enqueue", body=1)
    assert (await waiting)["messages"]


async def test_what_runs_is_said_with_its_use_of_the_machine(broker: Broker) -> None:
    shown = await shown_by(broker)
    ((labels, value),) = shown["wonderq_info"].items()
    assert (dict(labels)["version"], value) == (__version__, 1)
    assert dict(labels)["postgresql"] == (await broker.call("get_server"))["postgresql_version"]
    assert shown["wonderq_process_resident_memory_bytes"][()] > 10 * 2**20
    assert 0 < shown["wonderq_process_cpu_seconds_total"][()] <= time.process_time()
    assert abs(shown["wonderq_start_time_seconds"][()] - time.time()) < 3600


async def test_while_the_database_is_away_the_metrics_say_so_and_nothing_of_it(
    start_broker: StartBroker, test_server: str, database_url: str
) -> None:
    broker: Broker = await start_broker(request_timeout=0.5)
    assert (await shown_by(broker))["wonderq_database_up"] == {(): 1}
    with without_database(test_server, database_url):
        shown = await shown_by(broker)
        assert shown["wonderq_database_up"] == {(): 0}
        assert "wonderq_queue_messages" not in shown
        assert "wonderq_durability" not in shown

    async def is_back() -> bool:
        return (await shown_by(broker))["wonderq_database_up"] == {(): 1}

    await eventually(is_back)
    assert "wonderq_queue_messages" in await shown_by(broker)
