"""What gateways and instances count, for Prometheus (docs/metrics.md). Gateways show both.

An instance's counts travel in its InstanceStatus, a lender's in its heartbeats (messages/counts.py). No label may have
a value for each request or member that ever was.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.samples import Sample

REGISTRY = CollectorRegistry()
INSTANCE_REGISTRY = CollectorRegistry()
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

# ------------------------------------------------------------------ of an instance, its followers and lenders

STEPS = Counter("distkv_steps", "Steps of the engine", registry=INSTANCE_REGISTRY)
COMPUTED_TOKENS = Counter(
    "distkv_computed_tokens",
    "Tokens whose KV was computed: prompts, outputs, and all that again",
    registry=INSTANCE_REGISTRY,
)
RECOMPUTED_TOKENS = Counter(
    "distkv_recomputed_tokens",
    "Tokens whose KV was lost and is computed again: by a preemption, or with a creditor or another instance",
    registry=INSTANCE_REGISTRY,
)
PREEMPTIONS = Counter("distkv_preemptions", "Running requests that gave up their memory", registry=INSTANCE_REGISTRY)
LOANS_MADE = Counter("distkv_loans_made", "Loans that this member gave to others", registry=INSTANCE_REGISTRY)
LOANS_ENDED = Counter("distkv_loans_ended", "Of those, loans that have ended", registry=INSTANCE_REGISTRY)
LOANS_RECALLED = Counter(
    "distkv_loans_recalled", "Loans to this instance that their creditors wanted back early", registry=INSTANCE_REGISTRY
)
REFUSED_CHANNELS = Counter(
    "distkv_refused_channels", "Channels refused at the handshake, by reason", ["reason"], registry=INSTANCE_REGISTRY
)
WRONG_CREDITORS = Counter(
    "distkv_wrong_creditors",
    "Alarms: a creditor gave back other bytes than it got (`rblocks`), or answered wrongly (`partial`); logs name it",
    ["what"],
    registry=INSTANCE_REGISTRY,
)
REFUSED_ACCESSES = Counter(
    "distkv_refused_accesses",
    "Queries, stores and fetches refused: the loan has `ended`, the memory is another's (`foreign`), or nothing was "
    "stored there (`unwritten`)",
    ["kind", "reason"],
    registry=INSTANCE_REGISTRY,
)


def instance_counts() -> Iterator[Sample]:
    """What this process, a rank of an instance or a lender, has counted since it began."""
    return (x for family in INSTANCE_REGISTRY.collect() for x in family.samples if x.name.endswith("_total"))
