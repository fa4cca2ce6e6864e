"""Configuration of a gateway's admission: which requests it holds back, and for how long."""

from pydantic import Field

from megatron_distkv.config.base import FrozenConfig


class AdmissionConfig(FrozenConfig):
    max_queued_requests: int = Field(256, ge=0)
    """Requests held at one gateway until the pool has room for their prompts; one more is refused with 429."""
    max_queue_wait_s: float = Field(60.0, gt=0)
    """A request held for this long is refused with 429. A prompt too long for the pool as it is now, but not for what
    it was this long ago, is held as well: an instance may be about to come back."""
    overtake_within_s: float = Field(20.0, ge=0)
    """Shorter requests may overtake one that waits for room, for this long. Then memory gathers for it, and only much
    shorter ones pass it, together half of it."""
