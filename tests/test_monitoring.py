"""The files in docs/monitoring/: every series and label that they ask for is one that the server shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from config.serving_config import MetricsConfig
from server.metrics import Metrics, ModelMetrics

FOLDER = Path(__file__).parent.parent / "docs" / "monitoring"
PREFIX = MetricsConfig().prefix
FUNCTIONS = {"sum", "rate", "increase", "histogram_quantile"}
WORDS = {"by", "and"}
NUMBER = r"[-+]?\d+(?:\.\d+)?"
TOKEN = re.compile(rf"\s*(?:({NUMBER})|([a-zA-Z_:][\w:]*)|(\{{[^}}]*\}})|(\[[^\]]+\])|(==|[-/*+<>(),]))")


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    return content


def dashboard_expressions() -> Iterator[str]:
    """What the panels ask, with the variables of the dashboard put in."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("${prefix}", PREFIX).replace("$model", ".*")
            yield expression.replace("$__rate_interval", "1m")


def alerts() -> list[dict[str, Any]]:
    content = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in content["groups"] for rule in group["rules"]]


EXPRESSIONS = [*dashboard_expressions(), *(alert["expr"] for alert in alerts())]


@pytest.fixture(scope="module")
def shown() -> dict[str, set[str]]:
    """The series of a server, with their labels; ``up`` is Prometheus' own."""
    metrics = Metrics()
    ModelMetrics(metrics, "llama2").group(0)
    metrics.count_response(200)
    series: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


def tokens(expression: str) -> list[str]:
    """The words of a PromQL expression; what is none fails."""
    found, position = [], 0
    while position < len(expression.rstrip()):
        match = TOKEN.match(expression, position)
        assert match, f"no PromQL: {expression[position:]}"
        found.append(match[0].strip())
        position = match.end()
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_series_and_label_that_is_asked_for_exists(expression: str, shown: dict[str, set[str]]) -> None:
    words = tokens(expression)
    assert words.count("(") == words.count(")")
    series, labels, grouped = set(), {"job", "instance"}, set()
    after_by = False
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "by":
            after_by = True
        elif word == ")":
            after_by = False
        elif after_by and re.fullmatch(r"\w+", word):
            grouped.add(word)
        elif re.match(r"[a-zA-Z_]", word) and word not in WORDS:
            if following in ("(", "by"):
                assert word in FUNCTIONS, word
            else:
                series.add(word)
        elif word.startswith("{"):
            grouped.update(re.findall(r'(\w+)\s*(?:=~|=|!=|!~)\s*"', word))
    assert series
    assert series <= set(shown), f"not on /metrics: {series - set(shown)}"
    for name in series:
        labels |= shown[name]
    assert grouped <= labels, f"not a label: {grouped - labels}"


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_rates_are_of_counters_and_quantiles_of_buckets(expression: str) -> None:
    for name in re.findall(r"(?:rate|increase)\(([\w:]+)", expression):
        assert name.endswith(("_total", "_bucket", "_sum", "_count")), name
    if "histogram_quantile" in expression:
        assert re.search(r"by \([^)]*\ble\b[^)]*\)", expression)


def test_a_series_that_does_not_exist_is_found(shown: dict[str, set[str]]) -> None:
    for wrong in ("sum(rate(mindspore_llm_nothing_total[1m]))", 'mindspore_llm_agents_ready{nobody="x"}'):
        with pytest.raises(AssertionError, match=r"not on|not a label"):
            test_every_series_and_label_that_is_asked_for_exists(wrong, shown)


def test_the_dashboard_shows_what_an_operator_needs() -> None:
    asked = " ".join(dashboard_expressions())
    for name in (
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "generation_tokens_total",
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_hits_total",
        "num_preemptions_total",
        "step_plan_seconds_sum",
        "step_device_seconds_sum",
        "step_post_seconds_sum",
        "agents_ready",
        "agent_restarts_total",
        "http_responses_total",
    ):
        assert PREFIX + name in asked
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {variable["name"] for variable in dashboard()["templating"]["list"]} == {"datasource", "prefix", "model"}
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(places)) == len(places)


def test_the_scrape_and_the_alerts_belong_together() -> None:
    scrape = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    assert scrape["rule_files"] == ["alerts.yml"]
    [job] = scrape["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:9811"]}]
    assert any(f'job="{job["job_name"]}"' in alert["expr"] for alert in alerts())
    assert all(alert["annotations"]["summary"] and alert["labels"]["severity"] for alert in alerts())


def test_the_list_of_series_is_complete(shown: dict[str, set[str]]) -> None:
    text = (FOLDER.parent / "operations.md").read_text(encoding="utf-8")
    listed = {
        PREFIX + name for name in re.findall(r"^\| `(\w+)` \| (?:gauge|counter|histogram) \|", text, re.MULTILINE)
    }
    created = {name for name in shown if name.endswith("_created")}
    assert listed == {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} - created - {"up"}
