"""Prometheus metrics of the model server: counts and seconds only, no identifier of a patient or an image."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# buckets in seconds: from one image on a GPU to a full body on two cores
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("cxrloop_infer_requests", "POST /predict, by HTTP status", ["status"], registry=own)
        self.images = Counter("cxrloop_infer_images", "Images scored, by bundle", ["bundle"], registry=own)
        self.seconds = Histogram(
            "cxrloop_infer_seconds", "Seconds a scored request took", buckets=SECONDS, registry=own
        )
        self.bundle = Gauge(
            "cxrloop_infer_bundle_info", "1 for the bundle in service", ["bundle", "provider"], registry=own
        )
        self.swaps = Counter("cxrloop_infer_swaps", "Times another bundle came into service", registry=own)
        self.swap_seconds = Gauge("cxrloop_infer_last_swap_seconds", "Pointer read to ready, last swap", registry=own)
        self.refusals = Counter(
            "cxrloop_infer_refusals", "Bundles or pointers refused by prepare or reload", registry=own
        )

    def swapped(self, bundle: str, provider: str, seconds: float, first: bool) -> None:
        """Record the bundle now in service; the first one does not count as a swap."""
        self.bundle.clear()
        self.bundle.labels(bundle, provider).set(1)
        self.swap_seconds.set(seconds)
        if not first:
            self.swaps.inc()

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)
