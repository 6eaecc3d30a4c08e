"""What runs where: gateways, copies and ranks, what was lost and came back, versions, certificates, processes."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from helm.dashboards import panels as p
from helm.dashboards.promql import events, quantile, rate, series, total

_READY = 'state="ready"'
_OURS = f"and on (instance, job) {series('mull_build_info')}"
"""Behind a metric that every Python process may have: of our processes alone."""


def fleet() -> Dashboard:
    return p.board("mull-fleet", "mull / Fleet", "What runs where.", _now(), _losses(), _ranks(), _processes())


def _now() -> p.Section:
    away = f"{total('mull_ranks')} - {total('mull_ranks_ready')}"
    copies = f"max({series('mull_copies', _READY)})"
    return p.Section(
        "Now",
        [
            p.number(
                "Gateways ready",
                "Gateways that take new work.",
                p.COUNT,
                total("mull_gateway_ready"),
                thresholds=p.good_from(1),
            ),
            p.number(
                "Copies ready",
                "Copies of the model that gateways can reach.",
                p.COUNT,
                copies,
                thresholds=p.good_from(1),
            ),
            p.number("Ranks away", "Ranks that should run and do not.", p.COUNT, away, thresholds=p.bad_from(1)),
            p.number(
                "Ranks lost",
                "In the time shown.",
                p.COUNT,
                events("mull_ranks_lost_total"),
                thresholds=p.bad_from(1),
            ),
            p.number(
                "Restarts of ranks",
                "In the time shown.",
                p.COUNT,
                events("mull_engine_restarts_total"),
                thresholds=p.bad_from(3),
            ),
            p.number(
                "First certificate ends in",
                "A certificate that ended keeps everybody out.",
                p.SECONDS,
                f"min({series('mull_certificate_not_after_timestamp_seconds')}) - time()",
                thresholds=p.good_from(14 * 86400),
            ),
        ],
    )


def _losses() -> p.Section:
    return p.Section(
        "Losses and recoveries",
        [
            p.graph(
                "Ranks lost",
                "By cause: the process ended, was late, gave no sign of life, or reported a failure.",
                p.COUNT,
                p.Line("{{cause}}", events("mull_ranks_lost_total", "cause")),
            ),
            p.graph(
                "Pauses",
                "How long streams stood still; p95 by cause.",
                p.SECONDS,
                p.Line("{{cause}}", quantile(0.95, "mull_recovery_pause_seconds", "cause")),
            ),
            p.stacked(
                "Tokens computed again",
                "Tokens a second that were put through the model once more, by cause.",
                p.TOKENS_PER_S,
                p.Line("{{cause}}", rate("mull_replayed_tokens_total", "cause")),
            ),
            p.graph(
                "Sign of life",
                "Seconds since a copy last showed that it lives.",
                p.SECONDS,
                p.Line("{{instance}}", f"max by (instance) ({series('mull_engine_heartbeat_age_seconds')})"),
            ),
            p.graph(
                "Copies",
                "As the gateways see them.",
                p.COUNT,
                p.Line("{{state}}", f"max by (state) ({series('mull_copies')})"),
            ),
            p.graph(
                "Requests given up",
                "They brought down their ranks again and again; in the time shown.",
                p.COUNT,
                p.Line("{{instance}}", events("mull_quarantined_requests_total", "instance")),
            ),
        ],
    )


def _ranks() -> p.Section:
    return p.Section(
        "Ranks",
        [
            p.listing("Weights", "Bytes that each rank has loaded.", p.BYTES, series("mull_weight_bytes")),
            p.listing("KV pool", "Bytes that each rank keeps for KV.", p.BYTES, series("mull_kv_bytes")),
            p.listing("Time to load", "Of each rank's slice of the weights.", p.SECONDS, series("mull_load_seconds")),
        ],
    )


def _processes() -> p.Section:
    return p.Section(
        "Processes",
        [
            p.listing("Versions", "What runs, and the model it serves.", p.COUNT, series("mull_build_info")),
            p.graph(
                "CPU",
                "Cores in use.",
                "none",
                p.Line("{{instance}}", f"rate({series('process_cpu_seconds_total')}[$__rate_interval]) {_OURS}"),
            ),
            p.graph(
                "Memory",
                "Resident bytes.",
                p.BYTES,
                p.Line("{{instance}}", f"{series('process_resident_memory_bytes')} {_OURS}"),
            ),
            p.graph(
                "Up since",
                "Age of the processes; a saw tooth is a process that does not stay.",
                p.SECONDS,
                p.Line("{{instance}}", f"time() - {series('process_start_time_seconds')} {_OURS}"),
            ),
            p.graph(
                "Open files",
                "Of what the process may open.",
                p.SHARE,
                p.Line("{{instance}}", f"{series('process_open_fds')} / {series('process_max_fds')} {_OURS}"),
            ),
            p.graph(
                "Certificates",
                "Seconds until each ends.",
                p.SECONDS,
                p.Line(
                    "{{certificate}}",
                    f"min by (certificate) ({series('mull_certificate_not_after_timestamp_seconds')}) - time()",
                ),
            ),
        ],
    )
