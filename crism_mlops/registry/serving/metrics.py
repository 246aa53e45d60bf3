"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All figures of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("crism_serve_requests", "Requests answered", ("path", "code", "version"), registry=own)
        self.seconds = Histogram(
            "crism_serve_request_seconds", "From a prediction's request to its answer", registry=own, buckets=_SECONDS
        )
        self.queue = Histogram(
            "crism_serve_queue_seconds", "Waiting for the model, within a worker", registry=own, buckets=_SECONDS
        )
        self.model = Histogram(
            "crism_serve_model_seconds", "The model's own time for the batch", registry=own, buckets=_SECONDS
        )
        self.batch = Histogram("crism_serve_batch_images", "Images predicted together", registry=own, buckets=_BATCH)
        self.in_flight = Gauge("crism_serve_in_flight", "Predictions being made", registry=own)
        self.refused = Counter("crism_serve_refused", "Requests beyond the concurrency limit", registry=own)
        self.retries = Counter("crism_serve_retries", "Requests given to another worker", registry=own)
        self.restarts = Counter("crism_serve_worker_restarts", "Workers that ended by themselves", registry=own)
        self.workers = Gauge("crism_serve_workers_ready", "Workers that take requests", registry=own)
        self.served = Gauge("crism_serve_model", "The version that answers", ("name", "version", "run"), registry=own)
        self.swaps = Counter("crism_serve_swaps", "Versions taken into service, the first included", registry=own)
        self.swap_failures = Counter("crism_serve_swap_failures", "Attempts to load a version, failed", registry=own)
        self.swap_failing = Gauge("crism_serve_swap_failing", "1: the alias's version does not load", registry=own)
        self.registry_up = Gauge("crism_serve_registry_up", "1: the last look at the alias succeeded", registry=own)

    def text(self) -> bytes:
        """In Prometheus' text format, version 0.0.4."""
        return generate_latest(self.registry)
