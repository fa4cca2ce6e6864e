"""Lives of a pool's members in Redis (contract: DebtLedger)."""

import json
from collections.abc import Mapping

from megatron_distkv.errors import SupersededError
from megatron_distkv.ledger.records import HeartbeatReply, InstanceReport, Recall, Registration
from megatron_distkv.ledger.redis_records import pairs, read_move
from megatron_distkv.ledger.redis_scripts import RedisScripts, reading, to_ms
from megatron_distkv.rblock import InstanceId, LoanId


class RedisMembers(RedisScripts):
    @reading
    def register(
        self,
        instance: InstanceId,
        address: str,
        total_rblocks: int,
        reserved_rblocks: int,
        lease_s: float,
        *,
        epoch: int = 0,
        generation: str = "",
        info: Mapping[str, str] | None = None,
    ) -> Registration:
        facts = json.dumps(dict(info or {}))
        first, second = self._run(
            "register",
            instance,
            address,
            total_rblocks,
            reserved_rblocks,
            to_ms(lease_s),
            epoch,
            generation,
            facts,
        )
        if first == "superseded":
            raise SupersededError(f"a newer {instance} has registered (epoch {second}, this is {epoch})")
        return Registration(int(first), second)

    @reading
    def heartbeat(self, instance: InstanceId, epoch: int, report: InstanceReport, lease_s: float) -> HeartbeatReply:
        placements = [
            part
            for entry in report.placements
            for part in (f"{entry.request_id}|{entry.holder}", entry.num_rblocks, int(entry.is_local))
        ]
        reply = self._run(
            "heartbeat", instance, epoch, to_ms(lease_s), report.local_used_rblocks, report.state.value,
            report.num_running, report.num_waiting, report.max_request_tokens, *placements,
        )  # fmt: skip
        if int(reply[0]) == 0:
            return HeartbeatReply(known=False)
        _, generation, lent, borrowed, free, recalls, moves = reply
        return HeartbeatReply(
            known=True,
            generation=generation,
            lent=int(lent),
            borrowed=int(borrowed),
            free=int(free),
            recalls=tuple(Recall(LoanId(loan), instance, int(num)) for loan, num in pairs(recalls)),
            moves=tuple(read_move(instance, text) for text in moves),
        )

    @reading
    def describe(self, instance: InstanceId, epoch: int, info: Mapping[str, str]) -> bool:
        return bool(self._run("describe", instance, epoch, json.dumps(dict(info))))

    @reading
    def deregister(self, instance: InstanceId, epoch: int) -> None:
        self._run("deregister", instance, epoch)

    @reading
    def expire(self, limit: int = 64) -> list[InstanceId]:
        return [InstanceId(name) for name in self._run("expire", limit)]
