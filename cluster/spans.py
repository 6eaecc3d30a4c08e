"""Spans of one process, sent to an OpenTelemetry collector over OTLP.

Nobody waits for the collector: spans go into a bounded queue, the oldest are dropped where it is full, and a thread
sends them in batches. Imports the SDK: only a server that traces may import this.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags, set_span_in_context

from cluster.tracing import TraceParent

logger = logging.getLogger(__name__)

_TALKATIVE = ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal")
"""They log each try; `_OneLineExporter` says once what they would."""

Attributes = Mapping[str, str | int | float | Sequence[str]]


@dataclass(frozen=True)
class Exporting:
    """Where spans go to, and how long that may take."""

    endpoint: str
    sample_ratio: float = 1.0
    """Of the requests that come without a trace; a client's own decision is kept."""
    delay_s: float = 1.0
    """A span is sent so long after its end at the latest."""
    timeout_s: float = 5.0
    """For one batch, tries after failures included."""


class Tracing:
    """Begins spans. Close it: what is queued is sent then."""

    def __init__(self, exporting: Exporting, process: str) -> None:
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        resource = Resource.create(
            {
                "service.name": f"mull-{process}",
                "service.version": version("mull"),
                "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
            }
        )
        self._exporter = _OneLineExporter(exporting)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(exporting.sample_ratio)), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(self._exporter, schedule_delay_millis=1000 * exporting.delay_s)
        )
        self._tracer = self._provider.get_tracer("mull", version("mull"))

    def begin(self, name: str, parent: TraceParent | None, start_ns: int, attributes: Attributes) -> Span:
        """A span of work that was asked for from elsewhere."""
        return self._tracer.start_span(
            name, _context_of(parent), kind=SpanKind.SERVER, start_time=start_ns, attributes=dict(attributes)
        )

    def add_part(self, of: Span, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        """A stretch of a span, told when it is over."""
        context = set_span_in_context(of, Context())
        self._tracer.start_span(name, context, start_time=start_ns, attributes=dict(attributes)).end(end_ns)

    def close(self) -> None:
        """Send what is queued; waits for one batch at most where the collector does not answer."""
        self._exporter.hurry()
        self._provider.shutdown()


def parent_of(span: Span) -> TraceParent:
    """What makes a span elsewhere a child of this one."""
    context = span.get_span_context()
    return TraceParent(context.trace_id, context.span_id, int(context.trace_flags))


def _context_of(parent: TraceParent | None) -> Context:
    """Never that of the task: a span of someone else's instrumentation is no parent of ours."""
    if parent is None:
        return Context()
    told = SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=TraceFlags(parent.flags))
    return set_span_in_context(NonRecordingSpan(told), Context())


class _OneLineExporter(SpanExporter):
    """Says once that the collector does not take spans, and once that it does again."""

    def __init__(self, exporting: Exporting) -> None:
        self._exporter = OTLPSpanExporter(endpoint=exporting.endpoint, timeout=exporting.timeout_s)
        self._endpoint = exporting.endpoint
        self._is_failing = False
        self._hurries = threading.Event()

    def hurry(self) -> None:
        """The end is near: try no more where it does not work."""
        self._hurries.set()
        if self._is_failing:
            self._exporter.shutdown()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """In the thread that sends."""
        if self._is_failing and self._hurries.is_set():
            return SpanExportResult.FAILURE
        result = self._exporter.export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            logger.warning("spans cannot be sent to %s and are lost meanwhile; serving goes on", self._endpoint)
        elif self._is_failing and not is_failing:
            logger.info("spans are sent to %s again", self._endpoint)
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
