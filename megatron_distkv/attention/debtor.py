"""The asking side: one message per creditor and layer for the whole batch, answered while local work goes on."""

from collections.abc import Container, Mapping

import msgspec
import torch

from megatron_distkv.attention.creditor_channel import CreditorChannel
from megatron_distkv.attention.deadlines import Deadlines
from megatron_distkv.attention.host_memory import HostMemory
from megatron_distkv.attention.metadata import RemoteShare
from megatron_distkv.attention.partial import Partial
from megatron_distkv.attention.shares import ORDINARY
from megatron_distkv.attention.verification import Question, Verification
from megatron_distkv.clock import Clock
from megatron_distkv.errors import DistkvError, PeerLost
from megatron_distkv.messages import Acknowledge, MessageKind, QueryHeader, Scoring, decode
from megatron_distkv.rblock import HOST
from megatron_distkv.transport import Reply, TensorSpec, read_tensors


def wire_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Outputs travel in fp32 for an fp32 model, else in fp16: closer than bf16 for values of a softmax's size."""
    return torch.float32 if model_dtype == torch.float32 else torch.float16


class Debtor:
    """One step's questions. A lost creditor never raises here: it is noted in `lost` and its keys are left out.

    So all tensor-parallel ranks come to the same collectives; the leader then computes the requests concerned again.
    """

    def __init__(
        self,
        channels: Mapping[str, CreditorChannel],
        deadline_s: float,
        clock: Clock,
        host: HostMemory | None = None,
        verification: Verification | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        """`host`: the instance's own host memory, for rBlocks whose creditor is `HOST`.

        Without `deadlines` a creditor is lost after `deadline_s`, and not before, unless its channel ends.
        """
        self._deadlines = deadlines
        self._channels = channels
        self._host = host
        self._deadline_s = deadline_s
        self._clock = clock
        self._verification = verification
        self._step = 0
        self._remote: dict[str, RemoteShare] = {}
        self._seen: dict[int | None, dict[str, RemoteShare]] = {}  # by window: what its layers see of `_remote`
        self._told: dict[Scoring, int] = {}  # the layer that tells the shares to those that score alike
        self._posted: list[str] = []
        self.lost: dict[str, str] = {}
        self.waited_s = 0.0  # for answers, in this step
        self.held_back_s: dict[str, float] = {}  # by creditor: of that, because it has work of its own

    @property
    def host_memory(self) -> HostMemory:
        """Raises ValueError where there is none."""
        if self._host is None:
            raise ValueError("rBlocks in host memory that this instance has not")
        return self._host

    def begin_step(self, step: int, remote: dict[str, RemoteShare]) -> None:
        self._step = step
        self._remote = {creditor: share for creditor, share in remote.items() if creditor != HOST}
        if self._host is not None:
            self._host.begin_step(remote.get(HOST))
        self._seen, self._told = {}, {}
        self.lost = {}
        self.waited_s = 0.0
        self.held_back_s = {}

    def forget_all_but(self, creditors: Container[str]) -> None:
        """Nothing is kept of members that are gone."""
        if self._deadlines is not None:
            self._deadlines.forget_all_but(creditors)
        if self._verification is not None:
            self._verification.forget_all_but(creditors)

    def ask(self, layer: int, q_THD: torch.Tensor, scoring: Scoring = ORDINARY) -> None:
        """Send each creditor its query rows; none to whom the layer's window has left behind."""
        self._posted = []
        self._asked = (layer, q_THD, scoring)
        self._heads = q_THD.shape[1:]
        self._dtype = wire_dtype(q_THD.dtype)
        tells = self._told.setdefault(scoring, layer) == layer
        for creditor, remote in self._within(scoring.window).items():
            header = QueryHeader(self._step, layer, remote.shares if tells else None, scoring)
            if self.post(creditor, header, q_THD[remote.rows_R]):
                self._posted.append(creditor)

    def post(self, creditor: str, header: QueryHeader, q_RHD: torch.Tensor) -> bool:
        """False: it is lost."""
        if creditor in self.lost or creditor not in self._remote:
            return False
        try:
            self._channels[creditor].post(MessageKind.QUERY, msgspec.msgpack.encode(header), [q_RHD])
        except KeyError:
            self.lost[creditor] = "no channel"
        except DistkvError as error:
            self._note_lost(creditor, error)
        return creditor not in self.lost

    def _within(self, window: int | None) -> dict[str, RemoteShare]:
        if window not in self._seen:
            left = {creditor: remote.within(window) for creditor, remote in self._remote.items()}
            self._seen[window] = {creditor: remote for creditor, remote in left.items() if remote is not None}
        return self._seen[window]

    def answers(self) -> list[Partial]:
        """The partials of own host memory, computed while creditors compute theirs, and of all that answered."""
        partials = [] if self._host is None else self._host.partials(*self._asked)
        for creditor in self._posted:
            try:
                partials.append(self._answer(creditor))
            except DistkvError as error:
                self._note_lost(creditor, error)
        return partials

    def partials_of(self, question: Question) -> tuple[torch.Tensor, torch.Tensor] | None:
        """In fixed order: out `[partials, H, D]` and lse, good until the next question; None: the creditor is lost."""
        creditor, shape = question.creditor, (question.num_partials, *question.q_RHD.shape[1:])
        try:
            specs = [TensorSpec(shape, torch.float32), TensorSpec(shape[:2], torch.float32)]
            out, lse = read_tensors(self._accepted(creditor).payload, specs)
            if self._verification is None:
                return out, lse
            return self._verification.verified_in_fixed_order(self._channels[creditor], question, out, lse)
        except DistkvError as error:
            self._note_lost(creditor, error)
            return None

    def _accepted(self, creditor: str) -> Reply:
        reply = self._wait(creditor)
        done = decode(reply.header, Acknowledge)
        if done.refusal is not None:
            raise PeerLost(creditor, f"refused a query: {done.refusal.value}")
        self.held_back_s[creditor] = self.held_back_s.get(creditor, 0.0) + done.held_back_s
        return reply

    def _answer(self, creditor: str) -> Partial:
        reply = self._accepted(creditor)
        layer, q_THD, scoring = self._asked
        rows_R, shares = self._within(scoring.window)[creditor].rows_R, self._within(scoring.window)[creditor].shares
        num_heads, head_dim = self._heads
        out, lse = read_tensors(
            reply.payload,
            [
                TensorSpec((len(rows_R), num_heads, head_dim), self._dtype),
                TensorSpec((len(rows_R), num_heads), torch.float32),
            ],
        )
        partial = Partial(rows_R, out.to(torch.float32), lse.clone())
        if self._verification is None:
            return partial
        question = Question(creditor, layer, q_THD[rows_R], shares, self._dtype, scoring)
        return self._verification.verified(self._channels[creditor], question, partial)

    def _wait(self, creditor: str) -> Reply:
        began_s = self._clock.monotonic_s()
        try:
            self._raise_if_dead(creditor)
            reply = self._channels[creditor].wait(self._deadline_s - (self._clock.monotonic_s() - began_s))
        finally:
            self.waited_s += self._clock.monotonic_s() - began_s
        if self._deadlines is not None:
            self._deadlines.note(creditor, self._clock.monotonic_s() - began_s)
        return reply

    def _raise_if_dead(self, creditor: str) -> None:
        """Returns when it has answered, or when it has not and says that it lives."""
        deadlines, channel = self._deadlines, self._channels[creditor]
        if deadlines is None or (after_s := deadlines.doubtful_after_s(creditor)) >= self._deadline_s:
            return
        if not channel.is_answered(after_s) and not deadlines.is_alive(creditor) and not channel.is_answered(0.0):
            raise channel.give_up(f"no answer within {after_s:.1f} s, and no sign of life")

    def _note_lost(self, creditor: str, error: DistkvError) -> None:
        if self._deadlines is not None:
            self._deadlines.forget(creditor)
        self.lost[creditor] = error.reason if isinstance(error, PeerLost) else str(error)
