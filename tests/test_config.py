"""Flags and files become one frozen config; what is wrong is named."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.config_file import parse_config, read_config
from cluster.errors import ConfigError
from cluster.flags import add_serve_flags, builtin_model, config_from_flags
from cluster.router.assembly import runner_configs


def config_of(*flags: str, fallbacks: dict[str, int] | None = None) -> ClusterConfig:
    parser = argparse.ArgumentParser()
    add_serve_flags(parser, fallbacks=fallbacks or {})
    return config_from_flags(parser.parse_args(flags))


def test_without_flags_the_built_in_model_is_served() -> None:
    config = config_of()

    assert config.model.path == builtin_model()
    assert config.model.name == "pocket"
    assert (config.engine.tp, config.gateway.grpc_port, config.gateway.metrics_port) == (1, 50051, 9464)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mull.yaml"
    file.write_text("model: {path: /models/a, name: a}\nengine: {tp: 4, max_num_seqs: 8}\n")

    config = config_of("--config", str(file), "--tp", "2")

    assert (config.model.name, config.engine.tp, config.engine.max_num_seqs) == ("a", 2, 8)


def test_the_file_wins_over_a_commands_fallbacks(tmp_path: Path) -> None:
    file = tmp_path / "mull.yaml"
    file.write_text("engine: {tp: 4}\n")

    config = config_of("--config", str(file), fallbacks={"tp": 2, "grpc_port": 0})

    assert (config.engine.tp, config.gateway.grpc_port) == (4, 0)


def test_a_layout_comes_from_its_three_flags() -> None:
    engine = config_of("--tp", "2", "--dp", "4", "--expert-tp", "2", "--redundant-experts", "8").engine

    assert (engine.layout.world_size, engine.layout.ep, engine.redundant_experts) == (8, 4, 8)


def test_every_rank_is_told_how_it_computes() -> None:
    config = config_of("--deterministic", "--graphs", "piecewise", "--kv-dtype", "fp8", "--tp", "2")
    for runner in runner_configs(config, 4096, "cuda"):
        assert (runner.deterministic, runner.graphs, runner.kv_dtype) == (True, "piecewise", "fp8")


def test_gateways_and_routers_have_metrics_ports_of_their_own() -> None:
    config = config_of("--metrics-port", "7000", "--router-metrics-port", "7001", "--copies", "2")

    assert config.gateway.metrics_port == 7000
    assert list(config.router.metrics_ports) == [7001, 7002]
    assert list(config_of("--router-metrics-port", "0", "--copies", "2").router.metrics_ports) == [0]


def test_a_model_is_named_after_its_directory() -> None:
    assert config_of("--model", "/models/Qwen3-4B-Thinking-2507-FP8/").model.name == "Qwen3-4B-Thinking-2507-FP8"
    assert config_of("--model", "/models/x", "--served-model-name", "thinker").model.name == "thinker"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"engine": {"tp": 0}}, "engine.tp"),
        ({"engine": {"dp": 0}}, "engine.dp"),
        ({"engine": {"tp": 2, "dp": 2, "expert_tp": 3}}, "expert_tp 3 does not divide tp 2 * dp 2 = 4 ranks"),
        ({"engine": {"redundant_experts": -1}}, "engine.redundant_experts"),
        ({"engine": {"kv_dtype": "fp8", "device": "cpu"}}, "engine: kv_dtype fp8 needs a GPU"),
        ({"engine": {"products": "bf16", "device": "cuda"}}, "engine: products are a CPU's"),
        ({"engine": {"graphs": "whole", "dp": 2, "device": "cuda"}}, "engine: graphs whole needs dp 1, and dp is 2"),
        ({"engine": {"deterministic": True, "redundant_experts": 2}}, "engine: deterministic allows no redundant"),
        ({"engine": {"graphs": "some"}}, "engine.graphs"),
        ({"engine": {"typo": 1}}, "engine.typo"),
        ({"engine": {"max_num_seqs": 64, "max_num_batched_tokens": 32}}, "max_num_batched_tokens 32"),
        ({"engine": {"host_kv_bytes": 1, "enable_prefix_cache": False}}, "host_kv_bytes needs enable_prefix_cache"),
        ({"gateway": {"grpc_port": 70000}}, "gateway.grpc_port"),
        ({"gateway": {"grpc_port": 7000, "metrics_port": 7000}}, "both 7000"),
        ({"router": {"metrics_port": 9460, "copies": 8}}, "gateway.metrics_port 9464 is one of the Routers' metrics"),
        ({"router": {"metrics_port": 65535, "copies": 2}}, "metrics_port 65535 leaves no port for each of 2 copies"),
        ({"router": {"step_timeout_s": 0}}, "router.step_timeout_s"),
        ({"gateway": {"host": "0.0.0.0"}}, "gateway.host 0.0.0.0 is open to other machines in plain text"),
        ({"gateway": {"host": "gpu-1"}}, "--insecure"),
        ({"router": {"ray_address": "10.0.0.1:6379"}}, "router.ray_address 10.0.0.1:6379"),
        ({"tracing": {"otlp_endpoint": "http://otel.example:4317"}}, "spans would go to another machine in plain text"),
        ({"tracing": {"otlp_endpoint": "https://user:pass@otel.example:4317"}}, "tracing.otlp_endpoint: give http"),
        ({"security": {"tls_cert": "a.pem"}}, "security: tls_key is missing"),
        ({"security": {"link_cert": "a.pem", "link_key": "b.pem"}}, "security: link_ca is missing"),
        ({"security": {"tls_client_ca": "a.pem"}}, "tls_client_ca needs tls_cert"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_field(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config({"model": {"path": "x", "name": "x"}, **values})

    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "flags",
    [
        ("--host", "::1"),
        ("--host", "localhost", "--ray-address", "127.0.0.1:6379"),
        ("--host", "0.0.0.0", "--insecure"),
        ("--otlp-endpoint", "http://[::1]:4317"),
        ("--otlp-endpoint", "https://otel.example:4317"),
        ("--otlp-endpoint", "http://otel.example:4317", "--insecure"),
        ("--host", "0.0.0.0", "--tls-cert", "a.pem", "--tls-key", "a.key"),
        ("--ray-address", "10.0.0.1:6379", "--link-cert", "a.pem", "--link-key", "a.key", "--link-ca", "ca.pem"),
    ],
)
def test_plain_text_stays_on_this_machine_unless_it_is_asked_for(flags: tuple[str, ...]) -> None:
    assert config_of(*flags).security.insecure == ("--insecure" in flags)


@pytest.mark.parametrize("text", [b"a: [", b"- 1\n- 2\n", b"model: pocket\n", b"engine:\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_mapping_of_mappings_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "mull.yaml"
    file.write_bytes(text)

    with pytest.raises(ConfigError, match=r"mull\.yaml") as refused:
        read_config(file)
    assert "\n" not in str(refused.value)
