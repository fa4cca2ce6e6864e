"""Carries out a step's plan on one rank: moves and pulls, then one forward pass over the packed batch."""

from typing import NamedTuple

import torch

from megatron_distkv import metrics
from megatron_distkv.attention import (
    Debtor,
    FixedAttention,
    ForwardContext,
    KeptSpans,
    OpenRBlocks,
    QueryLimiter,
    Verification,
    build_metadata,
    forward_context,
)
from megatron_distkv.engine.batch import StepPlan
from megatron_distkv.errors import PeerLost
from megatron_distkv.kvcache.rblock_pool import RBlockPool
from megatron_distkv.model import GPT
from megatron_distkv.peers import Migration, Peers


class StepResult(NamedTuple):
    """Logits `[R, vocabulary]` of the plan's logit rows, and the creditors that this rank lost, with the reason.

    `wrong`: those of them that failed a check. `waited_s`: for creditors' answers, when nothing else was left to do.
    """

    logits_RV: torch.Tensor | None
    lost: dict[str, str]
    waited_s: float = 0.0
    held_back_s: dict[str, float] = {}  # noqa: RUF012  of that, by creditor: because it had work of its own
    wrong: frozenset[str] = frozenset()


class ModelRunner:
    def __init__(
        self,
        gpt: GPT,
        pool: RBlockPool,
        peers: Peers,
        migration: Migration,
        debtor: Debtor,
        verification: Verification,
        limiter: QueryLimiter,
        fixed: FixedAttention | None = None,
        open_rblocks: OpenRBlocks | None = None,
    ) -> None:
        """`fixed`: attention in fixed order, instead of the debtor's. `open_rblocks`: of a pool in int8."""
        self._fixed = fixed
        self._open_rblocks = open_rblocks
        self._limiter = limiter
        self._gpt = gpt
        self._pool = pool
        self._peers = peers
        self._migration = migration
        self._debtor = debtor
        self._verification = verification
        self._kept_spans = KeptSpans(pool.rblock_size)

    def run(self, plan: StepPlan) -> StepResult:
        """The same collectives on every rank, whatever is lost on the way."""
        metrics.STEPS.inc()
        metrics.COMPUTED_TOKENS.inc(len(plan.token_ids))
        result = self._run(plan)
        self._debtor.forget_all_but(self._peers.keys() - result.lost.keys())
        return result._replace(wrong=self._verification.take_wrong() & result.lost.keys())

    def _run(self, plan: StepPlan) -> StepResult:
        lost = self._migration.carry_out([*plan.moves, *plan.pulls, *plan.pushes])
        lost.update(self._open_channels(plan, lost))
        if not plan.token_ids:
            return StepResult(None, lost)
        metadata = build_metadata(plan.slices, self._pool.rblock_size, kept=self._kept_spans)
        if self._open_rblocks is not None:
            self._open_rblocks.begin_step(plan.slices)
        self._debtor.begin_step(plan.step, {name: r for name, r in metadata.remote.items() if name not in lost})
        if self._fixed is not None:
            places = None if self._open_rblocks is None else self._open_rblocks.places
            self._fixed.begin_step(plan.step, plan.slices, places)
        debtor = self._debtor if metadata.remote else None
        context = ForwardContext(metadata, self._pool.tensor_BLK2ND, debtor, self._fixed, self._open_rblocks)
        with forward_context(context), self._limiter.own_work():
            logits_RV = self._gpt(torch.tensor(plan.token_ids), torch.tensor(plan.logit_rows, dtype=torch.int64))
        return StepResult(
            logits_RV, {**lost, **self._debtor.lost}, self._debtor.waited_s, held_back_s=self._debtor.held_back_s
        )

    def _open_channels(self, plan: StepPlan, lost: dict[str, str]) -> dict[str, str]:
        unreachable = {}
        for peer in plan.creditors:
            if peer.instance not in lost:
                try:
                    self._peers.reach(peer)
                except PeerLost as error:
                    unreachable[peer.instance] = error.reason
        return unreachable
