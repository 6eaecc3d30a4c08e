"""Who gets in: TLS, keys, networks, Services and routes."""

from __future__ import annotations

import pytest

from cluster.config import EngineConfig
from tests.helm.chart import Helm, Manifest, Rendered
from tests.helm.schemas import check_builtin

TLS = "values-4b-1xh200.yaml"
S3 = ("model.source=s3", "model.path=x", "model.download.repository=bucket/x")
EXISTING = ("security.tls.mode=existing", "security.tls.secretName=ports", "security.tls.linkSecretName=link")


def secrets(rendered: Rendered, group: str) -> set[str]:
    volumes = rendered.group(group)["template"]["spec"]["volumes"]
    return {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}


def ports(service: Manifest) -> dict[str, str | None]:
    return {port["name"]: port.get("appProtocol") for port in service["spec"]["ports"]}


def test_plain_text_is_asked_for(helm: Helm) -> None:
    refusal = helm.refusal("security.insecure=false")

    assert "prompts would cross the network in plain text; set it to certManager or existing" in refusal


def test_only_gateways_see_keys_and_the_ports_certificate(helm: Helm) -> None:
    rendered = helm.template(*EXISTING, "security.keys.secretName=api-keys", "security.tls.clientCaSecretName=clients")

    assert secrets(rendered, "gateway") == {"ports", "link", "api-keys", "clients"}
    assert secrets(rendered, "ranks") == {"link"}
    security = rendered.cluster_config["security"]
    assert security["keys_file"] == "/etc/mull/keys/keys.yaml"
    assert security["tls_client_ca"] == "/etc/mull/client-ca/ca.crt"
    check_builtin({"apiVersion": "v1", "kind": "PodTemplate", "template": rendered.group("gateway")["template"]})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (["security.tls.mode=existing"], "give security.tls.secretName (tls.crt, tls.key)"),
        (["security.tls.clientCaSecretName=c"], "clientCaSecretName needs security.tls.mode certManager or existing"),
        (["security.tls.mode=self"], "/security/tls/mode"),
        (["model.source=pvc"], "model.source is pvc: give model.claimName"),
        (["model.source=hostPath"], "model.source is hostPath: give model.hostPath"),
        (["model.source=s3", "model.path=x"], "model.source is s3: give model.download.repository"),
        (["model.source=huggingface"], "model.source is huggingface: give model.path"),
        (["model.source=pvc", "model.claimName=c", "model.path=../x"], "model.path ../x: give a directory inside"),
        (["routes.enabled=true"], "give routes.parentRefs"),
        (["config.engine.max_num_sequences=1"], "additional properties 'max_num_sequences' not allowed"),
        (["gateway.ports.grpc=70000"], "/gateway/ports/grpc"),
        (["ranks.ports.metrics=9464"], "ranks.ports.metrics and gateway.ports.metrics are both 9464"),
        (["gateway.ports.http=50051"], "gateway.ports.grpc and gateway.ports.http are both 50051"),
        (["config.tracing.otlp_endpoint=http://collector"], "http://collector: give it as http://HOST:PORT"),
        ([*S3, "model.download.endpointUrl=minio:9000"], "endpointUrl minio:9000: give it as http://HOST:PORT"),
    ],
)
def test_a_wrong_value_is_a_sentence(helm: Helm, values: list[str], sentence: str) -> None:
    assert sentence in helm.refusal(*values)


def test_a_step_without_room_for_all_sequences_is_a_sentence(helm: Helm) -> None:
    defaults = EngineConfig()
    tokens, sequences = defaults.max_num_batched_tokens, defaults.max_num_seqs

    many = helm.refusal(f"config.engine.max_num_seqs={tokens + 1}")
    short = helm.refusal(f"config.engine.max_num_batched_tokens={sequences - 1}")
    assert f"max_num_batched_tokens {tokens} is below max_num_seqs {tokens + 1}; raise the one" in many
    assert f"max_num_batched_tokens {sequences - 1} is below max_num_seqs {sequences}; raise the one" in short
    helm.template(f"config.engine.max_num_seqs={tokens}")


def test_cert_manager_makes_what_the_pods_mount(helm: Helm) -> None:
    rendered = helm.template(preset=TLS)

    made = {it["spec"]["secretName"]: it["spec"] for it in rendered.of("Certificate")}
    issuers = {it["metadata"]["name"] for it in rendered.of("Issuer")}
    assert secrets(rendered, "gateway") | secrets(rendered, "ranks") <= set(made)
    assert {it["issuerRef"]["name"] for it in made.values()} <= issuers
    assert made["try-mull-link"]["dnsNames"] == ["mull-router"]
    assert "try-mull.models.svc" in made["try-mull-tls"]["dnsNames"]


def test_another_issuer_signs_only_the_ports_certificate(helm: Helm) -> None:
    rendered = helm.template(
        "security.tls.issuerRef.name=company", "security.tls.issuerRef.kind=ClusterIssuer", preset=TLS
    )

    signed_by = {it["metadata"]["name"]: it["spec"]["issuerRef"] for it in rendered.of("Certificate")}
    assert signed_by["try-mull-tls"] == {"name": "company", "kind": "ClusterIssuer"}
    assert signed_by["try-mull-link"] == {"name": "try-mull-authority", "kind": "Issuer"}


def test_services_tell_what_their_ports_speak(helm: Helm) -> None:
    plain, encrypted = helm.template(), helm.template(preset=TLS)

    for name in ("try-mull", "try-mull-headless"):
        assert ports(plain.one("Service", name)) == {"grpc": "kubernetes.io/h2c", "http": "http"}
        assert ports(encrypted.one("Service", name)) == {"grpc": None, "http": "https"}


def test_services_and_budgets_find_the_pods(helm: Helm) -> None:
    rendered = helm.template()

    labels = {
        group["groupName"]: {**group["template"]["metadata"]["labels"], "ray.io/group": group["groupName"]}
        for group in rendered.ray_groups[1:]
    }
    selectors = [service["spec"]["selector"] for service in rendered.of("Service")]
    assert all(selector.items() <= labels["gateway"].items() for selector in selectors)
    assert not any(selector.items() <= labels["ranks"].items() for selector in selectors)
    for budget in rendered.of("PodDisruptionBudget"):
        group = budget["metadata"]["name"].rpartition("-")[2]
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels[group].items()


def test_all_but_a_few_pods_must_stay_while_nodes_are_emptied(helm: Helm) -> None:
    """A share, or maxUnavailable, would need a RayCluster's scale, which it does not have: then none may go."""
    rendered = helm.template("gateway.replicas=3", "gateway.maxUnavailable=2", "layout.copies=4", "layout.maxCopies=6")

    specs = {it["metadata"]["name"]: it["spec"] for it in rendered.of("PodDisruptionBudget")}
    assert {name: spec["minAvailable"] for name, spec in specs.items()} == {"try-mull-gateway": 1, "try-mull-ranks": 3}
    assert not any("maxUnavailable" in spec for spec in specs.values())


def test_nothing_reaches_a_pod_but_what_is_opened(helm: Helm) -> None:
    rendered = helm.template("networkPolicy.clients[0].ipBlock.cidr=10.0.0.0/8")

    policies = {it["metadata"]["name"].removeprefix("try-mull"): it["spec"] for it in rendered.of("NetworkPolicy")}
    assert set(policies) == {"", "-clients", "-metrics", "-operator"}
    assert policies[""]["policyTypes"] == ["Ingress", "Egress"]
    assert policies["-clients"]["ingress"][0]["from"] == [{"ipBlock": {"cidr": "10.0.0.0/8"}}]
    assert [port["port"] for port in policies["-clients"]["ingress"][0]["ports"]] == [50051, 8000]
    assert policies["-operator"]["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"


def test_spans_may_go_to_their_collector_and_nowhere_else(helm: Helm) -> None:
    rendered = helm.template("config.tracing.otlp_endpoint=https://collector.observe:4317")

    (policy,) = (it for it in rendered.of("NetworkPolicy") if it["metadata"]["name"].endswith("-collector"))
    (out,) = policy["spec"]["egress"]
    assert out == {"to": [{"namespaceSelector": {}}], "ports": [{"protocol": "TCP", "port": 4317}]}
    assert rendered.cluster_config["tracing"] == {"otlp_endpoint": "https://collector.observe:4317"}


def test_spans_in_plain_text_are_asked_for(helm: Helm) -> None:
    plain = "config.tracing.otlp_endpoint=http://collector.observe:4317"

    refusal = helm.refusal(*EXISTING, "security.insecure=false", plain)

    assert "spans would cross the network in plain text" in refusal
    assert helm.template(plain, "security.insecure=true").cluster_config["security"]["insecure"]


@pytest.mark.parametrize(
    ("values", "port"),
    [
        (["model.source=huggingface", *S3[1:]], 443),
        (S3, 443),
        ([*S3, "model.download.endpointUrl=http://minio:9000"], 9000),
        ([*S3, "model.download.endpointUrl=http://minio.store.svc"], 80),
        ([*S3, "model.download.endpointUrl=https://s3.example.org/"], 443),
    ],
)
def test_a_download_may_go_where_the_checkpoint_lies(helm: Helm, values: list[str], port: int) -> None:
    policies = helm.template(*values).of("NetworkPolicy")

    (policy,) = (it for it in policies if it["metadata"]["name"].endswith("-download"))
    assert policy["spec"]["egress"] == [{"ports": [{"protocol": "TCP", "port": port}]}]
    check_builtin(policy)


def test_routes_lead_to_the_service(helm: Helm) -> None:
    rendered = helm.template(
        "routes.enabled=true",
        "routes.parentRefs[0].name=edge",
        "routes.grpcHostnames[0]=grpc.example.org",
        "routes.httpHostnames[0]=api.example.org",
    )

    for kind, port in (("GRPCRoute", 50051), ("HTTPRoute", 8000)):
        route = rendered.one(kind)["spec"]
        assert route["parentRefs"] == [{"name": "edge"}]
        assert route["rules"][0]["backendRefs"] == [{"name": "try-mull", "port": port}]


def test_prometheus_finds_the_ports_with_metrics(helm: Helm) -> None:
    rendered = helm.template("monitoring.podMonitors=true", "monitoring.labels.release=prometheus")

    named = {
        port["name"]
        for group in rendered.ray_groups
        for container in group["template"]["spec"]["containers"]
        for port in container["ports"]
    }
    monitors = rendered.of("PodMonitor")
    assert len(monitors) == 2
    for monitor in monitors:
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in named


def test_prometheus_may_read_what_it_finds(helm: Helm) -> None:
    rendered = helm.template("ranks.ports.metrics=9999")

    ports = {
        container["name"]: {port["name"]: port["containerPort"] for port in container["ports"]}
        for group in rendered.ray_groups
        for container in group["template"]["spec"]["containers"]
    }
    (policy,) = (it for it in rendered.of("NetworkPolicy") if it["metadata"]["name"].endswith("-metrics"))
    open_ports = [port["port"] for port in policy["spec"]["ingress"][0]["ports"]]
    assert open_ports == [ports["gateway"]["mull-metrics"], ports["ranks"]["mull-metrics"], ports["ranks"]["metrics"]]
    assert ports["ranks"]["mull-metrics"] == rendered.cluster_config["router"]["metrics_port"] == 9999


def test_the_test_pod_shows_what_is_asked_for(helm: Helm) -> None:
    rendered = helm.template("test.apiKeySecretName=mine", preset=TLS)

    pod = rendered.one("Pod")
    (container,) = pod["spec"]["containers"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert "--tls-ca" in container["command"]
    assert container["env"][-1]["valueFrom"]["secretKeyRef"] == {"name": "mine", "key": "MULL_API_KEY"}
    (tls,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == "tls")
    assert [item["key"] for item in tls["secret"]["items"]] == ["ca.crt"]  # never the key


def test_a_value_of_another_type_is_refused_by_name(helm: Helm) -> None:
    assert "/gateway/replicas" in helm.refusal("gateway.replicas=many")
