"""Prometheus metrics of this process. One registry, so that /metrics and the instances' reports show the same names."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

REQUESTS = Counter("distkv_requests", "Requests ended, by outcome", ["outcome"], registry=REGISTRY)
RESUMED = Counter("distkv_resumed_requests", "Losses of an instance made up for by another", registry=REGISTRY)
QUEUED_REQUESTS = Gauge(
    "distkv_queued_requests", "Requests held at this gateway until the pool has room", registry=REGISTRY
)
QUEUE_SECONDS = Histogram(
    "distkv_queue_seconds", "Arrival at the gateway to an instance that has room", buckets=_SECONDS, registry=REGISTRY
)
REFUSED_REQUESTS = Counter(
    "distkv_refused_requests",
    "Requests refused at the gateway before any work: `context_length_exceeded`, `queue_full`, `queue_timeout`, "
    "`no_instance`",
    ["reason"],
    registry=REGISTRY,
)
PROMPT_TOKENS = Counter("distkv_prompt_tokens", "Prompt tokens accepted", registry=REGISTRY)
OUTPUT_TOKENS = Counter("distkv_output_tokens", "Tokens sent to clients", registry=REGISTRY)
TTFT_SECONDS = Histogram(
    "distkv_time_to_first_token_seconds", "Arrival to first token", buckets=_SECONDS, registry=REGISTRY
)
TPOT_SECONDS = Histogram(
    "distkv_time_per_output_token_seconds", "Mean gap between tokens of a request", buckets=_SECONDS, registry=REGISTRY
)
INSTANCE_RBLOCKS = Gauge("distkv_rblocks", "rBlocks of an instance, by state", ["instance", "state"], registry=REGISTRY)
INSTANCE_REQUESTS = Gauge(
    "distkv_instance_requests", "Requests in an instance, by state", ["instance", "state"], registry=REGISTRY
)
REFUSED_CHANNELS = Counter(
    "distkv_refused_channels", "Channels refused at the handshake, by reason", ["reason"], registry=REGISTRY
)
WRONG_CREDITORS = Counter(
    "distkv_wrong_creditors",
    "Alarms: a creditor gave back other bytes than it got (`rblocks`), or answered wrongly (`partial`)",
    ["creditor", "what"],
    registry=REGISTRY,
)
REFUSED_ACCESSES = Counter(
    "distkv_refused_accesses",
    "Queries and stores refused: the loan has `ended`, or the memory is another's (`foreign`)",
    ["kind", "reason"],
    registry=REGISTRY,
)
