"""An OpenTelemetry collector's trace service: a real gRPC server that keeps the spans that are sent to it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1 import trace_pb2

WAIT_S = 60.0


@dataclass(frozen=True)
class SentSpan:
    """A span, and the service that sent it."""

    service: str
    proto: trace_pb2.Span

    @property
    def name(self) -> str:
        return self.proto.name

    @property
    def trace_id(self) -> str:
        return self.proto.trace_id.hex()

    @property
    def span_id(self) -> str:
        return self.proto.span_id.hex()

    @property
    def parent_id(self) -> str:
        return self.proto.parent_span_id.hex()

    @property
    def attributes(self) -> dict[str, object]:
        return {it.key: getattr(it.value, it.value.WhichOneof("value")) for it in self.proto.attributes}

    @property
    def events(self) -> list[str]:
        return [event.name for event in self.proto.events]


class Collector(TraceServiceServicer):
    """`with Collector() as collector`: listens on `endpoint`."""

    def __init__(self) -> None:
        self.spans: list[SentSpan] = []
        self._came = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Collector:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def Export(
        self, request: service.ExportTraceServiceRequest, _context: object
    ) -> service.ExportTraceServiceResponse:
        with self._came:
            for resource in request.resource_spans:
                names = {it.key: it.value.string_value for it in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans += [SentSpan(names["service.name"], span) for span in scope.spans]
            self._came.notify_all()
        return service.ExportTraceServiceResponse()

    def wait_for(self, *names: str) -> dict[str, SentSpan]:
        """The last span of each name, once there is one."""
        with self._came:
            came = self._came.wait_for(lambda: {it.name for it in self.spans} >= set(names), WAIT_S)
        assert came, f"waited {WAIT_S:g} s for {names}, got {[it.name for it in self.spans]}"
        return {span.name: span for span in self.spans}
