"""The alert rules: what they name exists, what they mean is written down, and each fires when it should."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.metrics import LIMITS, Metrics
from broker.receivers import Outcome
from broker.server import SHOWN_LIMITS
from broker.storage.durability import LEVELS
from test_metrics import promtool

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "docs" / "alerts.yml"
UNIT_TESTS = ROOT / "tests" / "data" / "alerts_test.yml"
PAGE = (ROOT / "docs" / "alerts.md").read_text("utf-8")

Json = dict[str, Any]
ALERTS: list[Json] = [rule for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]]
NAMES = [rule["alert"] for rule in ALERTS]
# What labels of metrics may be, where a rule names one.
LABELS = {
    "wonderq_limit": set(SHOWN_LIMITS),
    "wonderq_refused_total": set(LIMITS),
    "wonderq_durability": set(LEVELS),
    "wonderq_pushes_total": {str(outcome) for outcome in Outcome},
    "wonderq_subscriptions": {"active", "failing", "ended"},
    "wonderq_sweeps_total": {"done", "failed"},
    "wonderq_queue_messages": {"ready", "delayed", "leased"},
    "wonderq_calls_total": {"unavailable", "internal_error"},
}


def run_promtool(*words: str) -> str:
    """Run promtool, which must find nothing wrong; return what it says."""
    done = subprocess.run([promtool(), *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def every_metric() -> set[str]:
    """Return the names of all samples that there can be."""
    metrics = Metrics()
    families = [*metrics.registry.collect(), *metrics.of_database.describe()]
    names = {family.name for family in families} | {f"{each.name}_total" for each in families if each.type == "counter"}
    return names | {f"{each.name}_{part}" for each in families for part in ("bucket", "sum", "count")}


def test_the_rules_are_valid() -> None:
    assert f"{len(ALERTS)} rules found" in run_promtool("check", "rules", str(RULES))


def test_each_alert_fires_when_it_should_and_none_while_nothing_is_wrong() -> None:
    run_promtool("test", "rules", str(UNIT_TESTS))


def test_every_alert_is_seen_to_fire() -> None:
    fired = {
        name
        for test in yaml.safe_load(UNIT_TESTS.read_text("utf-8"))["tests"]
        for expected in test["promql_expr_test"]
        for sample in expected["exp_samples"]
        for name in re.findall(r'alertname="(\w+)"', sample["labels"])
    }
    assert fired == set(NAMES)


@pytest.mark.parametrize("rule", ALERTS, ids=NAMES)
def test_an_alert_names_only_what_there_is(rule: Json) -> None:
    used = set(re.findall(r"\bwonderq_\w+|\bup\b", rule["expr"]))
    assert used
    assert used <= every_metric() | {"up"}
    for metric, labels in re.findall(r"(wonderq_\w+)\{([^}]*)\}", rule["expr"]):
        for named in re.findall(r'"([^"]*)"', labels):
            assert set(named.split("|")) <= LABELS[metric], (metric, named)


@pytest.mark.parametrize("rule", ALERTS, ids=NAMES)
def test_an_alert_has_all_that_who_is_woken_needs(rule: Json) -> None:
    assert re.fullmatch(r"\d+[smh]", rule["for"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"].endswith(".")
    assert rule["annotations"]["runbook_url"] == f"alerts.md#{rule['alert'].lower()}"


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    alerts = PAGE.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    sections = dict(re.findall(r"^### (\w+)\n\n(.+?)(?=\n### |\Z)", alerts, re.M | re.S))
    assert list(sections) == NAMES
    assert all(len(text) > 100 for text in sections.values())
