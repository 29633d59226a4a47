"""Alerts and dashboards ask for metrics that exist."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from controlplane.client.objects import Object
from helm.rendering import CHART, NAMESPACE, RELEASE, Combinations, Rendered
from prometheus_client import Counter, Gauge, Histogram, Metric

from calotype.operator.runtime.metrics import Metrics
from calotype.serving.observability import metrics

promql_parser = pytest.importorskip("promql_parser", reason="pip install promql-parser")
MOST_LABELS = 6


def samples() -> dict[str, set[str]]:
    """Name of every sample that gateway and operator expose -> its labels, without values."""
    found: dict[str, set[str]] = {}
    for collector in (*vars(metrics).values(), *vars(Metrics()).values()):
        if isinstance(collector, Counter | Gauge | Histogram):
            for family in collect(collector):
                for sample in family.samples:
                    found[sample.name] = set(sample.labels)
    return found


def collect(collector: Counter | Gauge | Histogram) -> list[Metric]:
    """What a metric exposes; one with labels exposes nothing before somebody has given them."""
    if families := [family for family in collector.collect() if family.samples]:
        return families
    for count in range(1, MOST_LABELS + 1):
        values = ["some"] * count
        with contextlib.suppress(ValueError):  # it has another number of labels
            collector.labels(*values)
            families = list(collector.collect())
            collector.remove(*values)
            return families
    raise AssertionError(f"{collector} has more than {MOST_LABELS} labels")


SAMPLES = samples()
SCRAPED = {"namespace", "job", "instance", "pod", "service", "endpoint", "container"}
"""What Prometheus adds to every sample."""


def selectors(expression: Any) -> Iterator[Any]:
    """Every vector selector inside a PromQL expression."""
    kind = type(expression).__name__
    if kind == "VectorSelector":
        yield expression
    elif kind == "MatrixSelector":
        yield expression.vector_selector
    for member in ("lhs", "rhs", "expr"):
        if (inner := getattr(expression, member, None)) is not None:
            yield from selectors(inner)
    for inner in getattr(expression, "args", None) or []:
        yield from selectors(inner)


def check(text: str) -> None:
    """
    Raises:
        AssertionError: no PromQL, or it asks for something that nobody exposes.
    """
    plain = text.replace("$__rate_interval", "5m")
    found = list(selectors(promql_parser.parse(plain)))
    assert found, text
    for selector in found:
        assert selector.name in SAMPLES, f"{selector.name} in {text}"
        for matcher in selector.matchers.matchers:
            assert matcher.name in SAMPLES[selector.name] | SCRAPED, f"{matcher.name} in {text}"
    for group in re.findall(r"(?:by|on) \(([^)]*)\)", plain):
        labels = {label.strip() for label in group.split(",")}
        assert any(labels <= SAMPLES[s.name] | SCRAPED for s in found), text


def test_the_samples_are_what_the_registries_expose() -> None:
    metrics.HTTP_REQUESTS.labels("/v1/models", "GET", "200").inc(0)
    text = prometheus_client.generate_latest(metrics.REGISTRY).decode()
    assert "calotype_http_requests_total{" in text
    assert SAMPLES["calotype_http_requests_total"] == {"route", "method", "status"}


def rules(rendered: Rendered) -> list[Object]:
    (found,) = rendered.kind("PrometheusRule")
    return [rule for group in found["spec"]["groups"] for rule in group["rules"]]


def test_every_alert_asks_for_metrics_that_exist(combination: Combinations) -> None:
    found = rules(combination("production"))
    assert len(found) >= 8
    for rule in found:
        check(rule["expr"])
        assert f'namespace="{NAMESPACE}"' in rule["expr"]


def test_every_alert_says_what_to_look_at(combination: Combinations) -> None:
    for rule in rules(combination("production")):
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert re.fullmatch(r"\d+m", rule["for"])
        assert all(text.endswith(".") for text in rule["annotations"].values()), rule["alert"]
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["description"]))
        assert used <= set(re.findall(r"\w+", rule["expr"])), rule["alert"]
    described = " ".join(r["annotations"]["description"] for r in rules(combination("production")))
    assert f"deploy/{RELEASE}-operator" in described and "$RELEASE" not in described


DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_panel_asks_for_metrics_that_exist(file: Path) -> None:
    board = json.loads(file.read_text(encoding="utf-8"))
    assert board["panels"]
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in board["panels"]:
        assert panel["title"] and panel["description"].endswith("."), panel["id"]
        for target in panel["targets"]:
            check(target["expr"])
            assert 'namespace="$namespace"' in target["expr"]
            used = set(re.findall(r'"\$(\w+)"', target["expr"]))
            assert used <= variables
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= set(re.findall(r"\w+", target["expr"]))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            metric = re.match(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert metric and metric[1] in SAMPLES
            assert metric[2] in SAMPLES[metric[1]] | SCRAPED


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_panels_lie_beside_each_other(file: Path) -> None:
    panels = json.loads(file.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & mine, panel["title"]
        cells |= mine


def test_dashboards_come_as_config_maps_that_grafana_finds(combination: Combinations) -> None:
    rendered = combination("production")
    for file in DASHBOARDS:
        config = rendered.one("ConfigMap", f"{RELEASE}-dashboard-{file.stem}")
        assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
        (text,) = config["data"].values()
        assert json.loads(text) == json.loads(file.read_text(encoding="utf-8"))


def test_nothing_of_monitoring_without_being_asked(combination: Combinations) -> None:
    for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule"):
        assert combination("trial").kind(kind) == []
    names = [item["metadata"]["name"] for item in combination("trial").kind("ConfigMap")]
    assert not any("dashboard" in name for name in names)


def test_monitors_scrape_the_ports_of_the_pods(combination: Combinations) -> None:
    rendered = combination("production")
    (service,), (pods,) = rendered.kind("ServiceMonitor"), rendered.kind("PodMonitor")
    ports = [p["name"] for p in rendered.one("Service", f"{RELEASE}-metrics")["spec"]["ports"]]
    assert [e["port"] for e in service["spec"]["endpoints"]] == ports
    operator = rendered.one("Deployment", f"{RELEASE}-operator")["spec"]["template"]["spec"]
    names = {port["name"] for port in operator["containers"][0]["ports"]}
    assert {e["port"] for e in pods["spec"]["podMetricsEndpoints"]} <= names
