"""What the sampler has chosen for one request."""

from typing import NamedTuple

from megatron_distkv.messages import TokenLogprobs


class SampledToken(NamedTuple):
    token_id: int
    logprobs: TokenLogprobs | None
