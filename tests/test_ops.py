"""What is shipped for those who run it: alerts, the dashboard, scaling. All of it speaks of what there is."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis.asyncio import Redis

from app.keys import Keys
from app.settings import Settings
from tests.described import all_metrics
from tests.processes import ROOT, Workers
from tests.producer import Producer, new_environment, request
from tests.promql import firing, read_series, seconds, selectors
from tests.waiting import eventually

OPS = ROOT / "ops"
ALERTS = OPS / "prometheus/alerts.yml"
TESTS = OPS / "prometheus/alerts_test.yml"
FROM_SCRAPING = {"instance", "job", "le"}
"""Labels that no metric declares."""


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    dashboard: dict[str, Any] = json.loads((OPS / "grafana/mollifier.json").read_text())
    return list(dashboard["panels"])


def expressions() -> Iterator[tuple[str, str]]:
    """All that is asked of Prometheus, by the title of whoever asks."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")


def shown() -> dict[str, set[str]]:
    """The names under which samples are shown, and their labels."""
    names: dict[str, set[str]] = {}
    for metric in all_metrics():
        suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {metric.name + suffix: {*metric.labels} for suffix in suffixes}
    return names


@pytest.mark.parametrize(("name", "expression"), list(expressions()), ids=str)
def test_an_expression_speaks_of_metrics_and_labels_that_exist(name: str, expression: str) -> None:
    known = shown()
    for selector, summed_by in selectors(expression):
        assert selector.name in known, name
        used = {matcher.name for matcher in selector.matchers.matchers} | summed_by
        assert used <= known[selector.name] | FROM_SCRAPING, name


def _cases() -> Iterator[Any]:
    for test in yaml.safe_load(TESTS.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            label = f"{test['name']} {case['alertname']} {case['eval_time']}".replace(" ", "-")
            yield pytest.param(test, case, id=label)


@pytest.mark.parametrize(("test", "case"), list(_cases()))
def test_an_alert_fires_when_it_should_and_only_then(test: dict[str, Any], case: dict[str, Any]) -> None:
    (rule,) = (rule for rule in rules() if rule["alert"] == case["alertname"])
    series = read_series(test["input_series"], seconds(test["interval"]))
    every_s = seconds(yaml.safe_load(TESTS.read_text())["evaluation_interval"])
    expected = [alert["exp_labels"] for alert in case.get("exp_alerts", ())]
    assert firing(rule, series, seconds(case["eval_time"]), every_s) == expected


def test_promtool_says_the_same() -> None:
    """Values in annotations included, which the test above leaves to it."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool on PATH")
    for arguments in (["check", "rules", str(ALERTS)], ["test", "rules", str(TESTS)]):
        done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_both_ways() -> None:
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    for rule in rules():
        own = [case for case in cases if case["alertname"] == rule["alert"]]
        assert {bool(case.get("exp_alerts")) for case in own} == {True, False}, rule["alert"]


def test_the_dashboard_can_be_imported() -> None:
    """Panels do not overlap, each topic has a row, and every query goes to the chosen data source."""
    assert len({panel["id"] for panel in panels()}) == len(panels())
    assert panels()[0]["type"] == "row"
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"


def test_every_metric_is_on_the_dashboard() -> None:
    asked = {
        selector.name
        for panel in panels()
        for target in panel.get("targets", ())
        for selector, _ in selectors(target["expr"].replace("$__rate_interval", "1m"))
    }
    missing = [
        metric.name
        for metric in all_metrics()
        if not asked & {metric.name, f"{metric.name}_bucket", f"{metric.name}_sum"}
    ]
    assert missing == []


def scaled() -> dict[str, Any]:
    documents = yaml.safe_load_all((OPS / "keda/triggers.yaml").read_text())
    (one,) = (document for document in documents if document["kind"] == "ScaledObject")
    (trigger,) = one["spec"]["triggers"]
    metadata: dict[str, Any] = trigger["metadata"]
    return {"type": trigger["type"], **metadata}


def test_scaling_looks_at_the_group_that_workers_read_with() -> None:
    settings = Settings.model_construct()
    keys, trigger = Keys(settings.namespace, settings.partitions), scaled()
    assert (trigger["type"], trigger["stream"], trigger["consumerGroup"]) == (
        "redis-streams",
        keys.triggers,
        keys.group,
    )
    assert int(trigger["lagCount"]) == 2 * settings.trigger_batch_size
    assert "activationLagCount" in trigger, "KEDA refuses lagCount without it"


async def test_the_lag_that_scaling_looks_at_is_what_nobody_has_read(
    workers: Workers, redis_url: str, redis: Redis, database_url: str, producer: Producer
) -> None:
    """Also after requests were answered, and so deleted: it is never null, which KEDA could not read."""

    async def lag() -> int:
        (group,) = await redis.xinfo_groups(scaled()["stream"])
        assert group["name"].decode() == scaled()["consumerGroup"]
        return int(group["lag"])

    (worker,) = await workers.start_ready("triggers", redis_url, database_url)
    await producer.ask_all([request(new_environment()) for _ in range(30)])
    await producer.settled()
    assert await lag() == 0
    worker.terminate()
    assert await worker.ended() == 0
    await producer.send_all([request(new_environment()) for _ in range(20)])
    assert await lag() == 20
    (worker,) = await workers.start_ready("triggers", redis_url, database_url)

    async def is_read() -> None:
        assert await lag() == 0

    await eventually(is_read)


def test_files_that_ops_name_exist() -> None:
    for path in (path for path in OPS.rglob("*") if path.is_file()):
        named = re.findall(r"\b(?:docs|tests|ops|app)/[\w./-]+\.\w+", path.read_text())
        assert [file for file in named if not Path(ROOT / file).exists()] == [], path
