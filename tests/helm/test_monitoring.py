"""Rules, dashboards and what is promised: as the files have them, with what the values change."""

from __future__ import annotations

import json

import yaml

from tests.helm.chart import CHART, Helm, Manifest, Rendered
from tests.helm.schemas import check_builtin

RULES = sorted((CHART / "rules").glob("*.yaml"))
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))


def groups(rendered: Rendered) -> list[Manifest]:
    return [group for rule in rendered.of("PrometheusRule") for group in rule["spec"]["groups"]]


def alerts(rendered: Rendered) -> list[Manifest]:
    return [rule for group in groups(rendered) for rule in group["rules"] if "alert" in rule]


def expressions(rendered: Rendered) -> dict[str, str]:
    return {rule["record"]: rule["expr"] for group in groups(rendered) for rule in group["rules"] if "record" in rule}


def test_the_charts_rules_are_those_of_the_files(helm: Helm) -> None:
    rendered = helm.template("monitoring.rules=true", "monitoring.labels.release=prometheus")

    assert groups(rendered) == [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    assert all(rule["metadata"]["labels"]["release"] == "prometheus" for rule in rendered.of("PrometheusRule"))


def test_what_is_promised_comes_from_the_values(helm: Helm) -> None:
    promises = {
        "failed": 0.02,
        "firstTokenSeconds": 2.5,
        "firstTokenLate": 0.03,
        "firstAnswerSeconds": 60,
        "firstAnswerLate": 0.04,
    }
    # With --set a fraction would be a text.
    more = ("--set-json", f"monitoring.objectives={json.dumps(promises)}")
    rendered = helm.template("monitoring.rules=true", more=more)

    promised = expressions(rendered)
    assert promised["mull:objective_failed:ratio"] == "vector(0.02)"
    assert promised["mull:objective_first_token_late:ratio"] == "vector(0.03)"
    assert promised["mull:objective_first_answer_late:ratio"] == "vector(0.04)"
    assert '{le="2.5"}' in promised["mull:first_tokens_late:total"]
    assert '{le="60.0"}' in promised["mull:first_answers_late:total"]


def test_a_time_between_the_bounds_of_the_histogram_is_refused(helm: Helm) -> None:
    words = helm.refusal("monitoring.rules=true", "monitoring.objectives.firstTokenSeconds=7")

    assert "firstTokenSeconds" in words


def test_an_alert_sends_its_reader_where_the_values_say(helm: Helm) -> None:
    here = helm.template("monitoring.rules=true")
    there = helm.template("monitoring.rules=true", "monitoring.runbooks=https://wiki.example.org/mull")

    places = [alert["annotations"]["runbook"] for alert in alerts(here)]
    urls = [alert["annotations"]["runbook_url"] for alert in alerts(there)]
    assert len(urls) > 10
    assert [place.replace("docs/runbooks.md", "https://wiki.example.org/mull") for place in places] == urls
    assert not any("runbook_url" in alert["annotations"] for alert in alerts(here))
    assert not any("runbook" in alert["annotations"] for alert in alerts(there))


def test_what_is_no_url_of_runbooks_is_a_sentence(helm: Helm) -> None:
    words = helm.refusal("monitoring.rules=true", "monitoring.runbooks=docs/runbooks.md")

    assert "monitoring.runbooks docs/runbooks.md is no URL; give the address" in words


def test_every_dashboard_is_a_config_map_that_grafana_finds(helm: Helm) -> None:
    rendered = helm.template("monitoring.dashboards=true", "monitoring.dashboardLabels.folder=models")

    maps = [it for it in rendered.of("ConfigMap") if "grafana_dashboard" in it["metadata"]["labels"]]
    shown = {name: json.loads(text) for it in maps for name, text in it["data"].items()}
    assert shown == {file.name: json.loads(file.read_text()) for file in DASHBOARDS}
    assert {it["metadata"]["labels"]["folder"] for it in maps} == {"models"}
    for it in maps:
        check_builtin(it)


def test_what_is_scraped_carries_the_name_of_its_installation(helm: Helm) -> None:
    rendered = helm.template("monitoring.podMonitors=true")

    for monitor in rendered.of("PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert {"targetLabel": "installation", "replacement": "models/try-mull"} in endpoint["relabelings"]


def test_without_being_asked_for_nothing_of_it_is_made(helm: Helm) -> None:
    rendered = helm.template()

    assert not rendered.of("PrometheusRule")
    assert not rendered.of("PodMonitor")
    assert len(rendered.of("ConfigMap")) == 1
