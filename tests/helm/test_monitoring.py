"""Alerts fire when they should, each has a runbook, and Grafana asks for metrics that there are."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chart import CHART, MONITORING, PROMTOOL, ROOT, only, render_with_helm3, tool

ALERTS = CHART / "files" / "alerts.yaml"
GRAFANA = CHART / "files" / "grafana.json"
OUTSIDE = ROOT / "deploy" / "monitoring"
RUNBOOKS = ROOT / "docs" / "runbooks"
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
SERVICE_METRICS = {
    "ngd_jobs",
    "ngd_oldest_queued_seconds",
    "ngd_reconciler_tick_age_seconds",
    "ngd_reconciler_tick_seconds_bucket",
    "ngd_dispatcher_up",
    "ngd_attempts_started_total",
    "ngd_attempts_ended_total",
    "ngd_events_ingested_total",
    "ngd_http_requests_total",
    "ngd_http_request_seconds_bucket",
    "ngd_running_job_idle_seconds",
    "ngd_longest_in_phase_seconds",
    "ngd_build_info",
}


def promtool(*arguments: str | Path) -> str:
    command = [tool(PROMTOOL, "promtool"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_alerts_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", ROOT / "tests" / "helm" / "alerts_test.yaml")


def test_every_alert_is_tested() -> None:
    tested = yaml.safe_load((ROOT / "tests" / "helm" / "alerts_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tested for case in test["alert_rule_test"] if case["exp_alerts"]}

    assert fired == {rule["alert"] for rule in RULES}


def test_prometheus_takes_the_rules_and_its_configuration(tmp_path: Path) -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", ALERTS)
    promtool("check", "config", "--syntax-only", OUTSIDE / "prometheus.yml")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert_has_a_runbook_that_says_what_to_do(rule: dict[str, Any]) -> None:
    page = ROOT / rule["annotations"]["runbook_url"]
    text = page.read_text()

    assert page == RUNBOOKS / f"{rule['alert']}.md"
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    for part in (f"# {rule['alert']}\n", "**Means**", "**Look at**", "**Do**"):
        assert part in text
    assert re.search(
        rf"\[{rule['alert']}\]\(.*\) \| {rule['labels']['severity']} \|", (RUNBOOKS / "index.md").read_text()
    )


def test_every_runbook_has_an_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} - {"index"} == {rule["alert"] for rule in RULES}


@pytest.mark.parametrize(
    ("values", "claims"),
    [
        ({"dispatcher": {"mode": "local"}}, "ngd-home"),
        ({"dispatcher": {"mode": "kuberay"}, "fullnameOverride": "training"}, "training-home|training-runs"),
        (
            {
                "dispatcher": {"mode": "kuberay"},
                "storage": {"home": {"existingClaim": "disk"}, "runs": {"existingClaim": "shared"}},
            },
            "disk|shared",
        ),
        (
            {"dispatcher": {"mode": "kuberay"}, "database": {"type": "postgres", "existingSecret": "url"}},
            "ngd-runs",
        ),
    ],
)
def test_the_charts_rule_watches_the_claims_of_its_release(values: dict[str, Any], claims: str, tmp_path: Path) -> None:
    objects = render_with_helm3(values | {"prometheusRule": {"enabled": True}}, apis=(MONITORING,))

    spec = only(objects, "PrometheusRule")["spec"]

    (expression,) = (rule["expr"] for rule in spec["groups"][0]["rules"] if rule["alert"] == "NgdVolumeFilling")
    watched = f'{{namespace="ngd", persistentvolumeclaim=~"{claims}"}}'
    assert re.findall(r"\{[^}]*\}", expression) == [watched] * 4
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    promtool("check", "rules", tmp_path / "rules.yaml")


def test_alerts_and_dashboard_ask_for_metrics_that_the_service_has() -> None:
    asked = {metric for expression in expressions() for metric in re.findall(r"\bngd_[a-z_]+", expression)}

    assert asked == SERVICE_METRICS, "a metric that is not there, or one that nobody looks at"


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in RULES)
    for panel in json.loads(GRAFANA.read_text())["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))


def test_panels_find_volumes_and_pods_whatever_the_release_is_called() -> None:
    kubelets = [one for one in expressions() if "kubelet_" in one or "container_" in one]

    assert len(kubelets) > len([rule for rule in RULES if "kubelet_" in rule["expr"]])
    for expression in kubelets:
        assert "$namespace" not in expression or "ngd" not in expression, expression


def test_panels_can_be_told_apart_and_understood() -> None:
    panels = [panel for panel in json.loads(GRAFANA.read_text())["panels"] if panel["type"] != "row"]

    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})
    for panel in panels:
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        x, width = panel["gridPos"]["x"], panel["gridPos"]["w"]
        assert x + width <= 24


def test_panels_ask_in_words_that_prometheus_understands(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": one} for number, one in enumerate(expressions())]
    text = yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}).replace("$namespace", "ngd")
    (tmp_path / "panels.yaml").write_text(text)

    promtool("check", "rules", "--lint=none", tmp_path / "panels.yaml")


def test_a_prometheus_outside_a_cluster_uses_the_same_rules_and_job() -> None:
    configuration = yaml.safe_load((OUTSIDE / "prometheus.yml").read_text())
    readme = (OUTSIDE / "README.md").read_text()

    assert [job["job_name"] for job in configuration["scrape_configs"]] == ["ngd"]
    assert "helm/ngd/files/alerts.yaml:/etc/prometheus/rules/alerts.yaml" in readme
    for file in sorted(OUTSIDE.glob("targets-*.yaml")):
        assert yaml.safe_load(file.read_text())[0]["labels"]["namespace"]
