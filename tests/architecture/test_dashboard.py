"""The Grafana dashboard against the code that measures: every name and label it asks for exists, and every measurement
is shown."""

from __future__ import annotations

import ast
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.unit

DASHBOARD = json.loads((REPOSITORY / "deploy" / "grafana-dashboard.json").read_text(encoding="utf-8"))
SUFFIXES = {"Histogram": ("_bucket", "_sum", "_count"), "Counter": ("_total",), "Gauge": ("",)}
"""That the OpenTelemetry exporter of Ray's node agents gives each kind."""
COLUMNS = 24


def measured() -> tuple[dict[str, set[str]], set[str], set[str]]:
    """Exported names with the labels of each, the measurements' own names, and all texts of the source."""
    tree = ast.parse((REPOSITORY / "htcl_ray" / "serving" / "observability.py").read_text(encoding="utf-8"))
    exported: dict[str, set[str]] = {}
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SUFFIXES:
            name = ast.literal_eval(node.args[0])
            labels = {
                part
                for argument in node.args[1:]
                if isinstance(argument, ast.Tuple)
                for part in ast.literal_eval(argument)
            }
            own.add(name)
            for suffix in SUFFIXES[node.func.id]:
                exported[f"ray_{name}{suffix}"] = labels | ({"le"} if suffix == "_bucket" else set())
    return (
        exported,
        own,
        {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)},
    )


EXPORTED, OWN, TEXTS = measured()
RAYS = {"ray_serve_num_http_requests_total": {"application", "method", "route", "status_code"}}
"""Of Ray Serve's own metrics, those that count what HAProxy responds."""
EXPORTED |= RAYS
TEXTS |= {"htcl"}
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel.get("targets", [])]
QUERIES = [
    (f"${variable['name']}", variable["definition"])
    for variable in DASHBOARD["templating"]["list"]
    if "definition" in variable
]


def test_there_is_something_to_check():
    assert len(OWN) >= 10
    assert len(EXPRESSIONS) >= 15


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS + QUERIES)
def test_every_metric_and_label_exists(title: str, expression: str):
    names = re.findall(r"\bray_\w+", expression)
    assert names
    for name in names:
        assert name in EXPORTED, f"{title}: {name} is not exported"
    known = set.intersection(*(EXPORTED[name] for name in names))
    for selector in re.findall(r"\{([^}]*)\}", expression):
        for label, value in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"([^\"]*)\"", selector):
            assert label in known, f"{title}: {label} is no label of {names}"
            assert (
                value.startswith("$")
                or value in TEXTS
                or (label in ("status", "status_code") and re.fullmatch(r"[1-5]\d\d", value))
            ), value
    for grouping in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in grouping.split(",")} <= known, f"{title}: grouped by what is no label"
    assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_quantiles_keep_the_buckets_and_counters_are_rates(title: str, expression: str):
    if "histogram_quantile" in expression:
        assert re.search(r"by \(le\b", expression)
    for name in re.findall(r"\b\w+_(?:total|bucket|sum|count)\b", expression):
        assert re.search(rf"rate\({name}[^)]*\[\$__rate_interval\]\)", expression), f"{title}: {name} without a rate"


def test_legends_name_labels_that_the_expression_keeps():
    for panel in PANELS:
        for target in panel.get("targets", []):
            kept = {
                label.strip()
                for grouping in re.findall(r"\bby \(([^)]*)\)", target["expr"])
                for label in grouping.split(",")
            }
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == kept - {"le"}, panel["title"]


def test_every_measurement_is_shown():
    shown = {
        name
        for _, expression in EXPRESSIONS
        for name in re.findall(r"\bray_(htcl_\w+?)(?:_bucket|_sum|_count|_total)?\b", expression)
    }
    assert shown == OWN


def test_panels_have_titles_numbers_and_places_of_their_own():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    for place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= COLUMNS
        assert min(place["w"], place["h"]) >= 1
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_the_data_source_is_chosen_by_who_looks():
    kinds = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert kinds["datasource"] == "datasource"
    for panel in PANELS:
        for part in [panel, *panel.get("targets", [])] if panel["type"] != "row" else []:
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_names_are_as_the_exporter_of_rays_agents_writes_them():
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.metrics import Observation
    from opentelemetry.sdk.metrics import MeterProvider
    from prometheus_client import REGISTRY, generate_latest
    from ray._private.telemetry.open_telemetry_metric_recorder import NAMESPACE

    provider = MeterProvider(metric_readers=[PrometheusMetricReader()])
    meter = provider.get_meter("test")
    one = [lambda options: [Observation(1)]]
    meter.create_observable_counter(f"{NAMESPACE}_htcl_test_counter", one, unit="1")
    meter.create_observable_gauge(f"{NAMESPACE}_htcl_test_gauge", one, unit="1")
    meter.create_histogram(f"{NAMESPACE}_htcl_test_histogram", unit="1").record(1)
    written = set(re.findall(r"^(ray_htcl_test_\w+)\{", generate_latest(REGISTRY).decode(), re.MULTILINE))
    provider.shutdown()
    expected = {f"ray_htcl_test_{kind.lower()}{suffix}" for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
    assert written == expected


def test_ray_counts_requests_under_the_name_and_labels_that_are_shown():
    from ray.serve._private import request_ingress_metrics

    texts = {
        node.value
        for node in ast.walk(ast.parse(Path(request_ingress_metrics.__file__).read_text()))
        if isinstance(node, ast.Constant)
    }
    assert {"serve_num_", "_requests"} <= texts
    assert RAYS["ray_serve_num_http_requests_total"] <= texts
