"""Where spans go. Needs the packages of the ``otel`` extra; only ``server/tracing.py`` imports it."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

from config.version import __version__

SERVICE = {"service.name": "mindspore-llm-serving", "service.version": __version__}


def start_export(name: str) -> None:
    """Send all spans of this process to the exporter ``otlp`` or ``console``, from a thread of its own.

    ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` rename the service.
    """
    exporter: SpanExporter = OTLPSpanExporter() if name == "otlp" else ConsoleSpanExporter()
    provider = TracerProvider(resource=Resource(SERVICE).merge(Resource.create()))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
