"""OpenTelemetry traces: one tree from a request at the gateway to each of its denoise steps.

Every request has a trace ID, also where nothing is exported: it is in its answer, in the log and
with its job. Spans are sent by OTLP over HTTP where ``OTEL_EXPORTER_OTLP_ENDPOINT`` or
``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` is set and ``calotype[traces]`` is installed. Prompts,
keys and pictures are in no span.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.context import Context

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROPAGATOR = TraceContextTextMapPropagator()
_HEADER = "traceparent"


@functools.cache
def provider() -> TracerProvider:
    """The one of this process. Not the global one: that is for whoever embeds us, and for Ray."""
    service = os.environ.get("OTEL_SERVICE_NAME", "calotype")
    made = TracerProvider(resource=Resource.create({"service.name": service}))
    if any(os.environ.get(name) for name in ENDPOINTS):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            log.warning("No traces are sent: install 'calotype[traces]' or unset %s.", ENDPOINTS[0])
        else:
            made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


@contextlib.contextmanager
def span(
    name: str,
    parent: str | None = None,
    *,
    server: bool = False,
    **attributes: str | int | float,
) -> Iterator[trace.Span]:
    """A span around what is done in the context, below ``parent`` or else the current one.

    An error that leaves it is noted by its class only: messages may quote a prompt.

    Args:
        parent: W3C ``traceparent``; one that cannot be read begins a new trace.
        server: it answers a request from outside.
    """
    kind = trace.SpanKind.SERVER if server else trace.SpanKind.INTERNAL
    with _tracer().start_as_current_span(
        name,
        context=_context(parent),
        kind=kind,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as made:
        try:
            yield made
        except BaseException as error:
            made.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise


def record(name: str, begun_ns: int, ended_ns: int, **attributes: str | int | float) -> None:
    """A span below the current one, from and to these times (`time.time_ns`)."""
    _tracer().start_span(name, start_time=begun_ns, attributes=attributes).end(ended_ns)


def traceparent() -> str | None:
    """The current span in W3C's words, to be handed on; None outside of any."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get(_HEADER)


def trace_id() -> str | None:
    """Of the current span, 32 hexadecimal digits."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None


def trace_id_of(parent: str | None) -> str | None:
    """The trace ID in a ``traceparent``."""
    if parent is None:
        return None
    context = trace.get_current_span(_context(parent)).get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None


def _context(parent: str | None) -> Context | None:
    return None if parent is None else _PROPAGATOR.extract({_HEADER: parent})


@functools.cache
def _tracer() -> trace.Tracer:
    return provider().get_tracer("calotype")
