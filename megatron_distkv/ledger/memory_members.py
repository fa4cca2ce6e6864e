"""Lives of a pool's members in this process's memory (contract: DebtLedger)."""

from collections.abc import Mapping
from dataclasses import replace

from megatron_distkv.errors import SupersededError
from megatron_distkv.ledger.memory_state import Entry, LockedState
from megatron_distkv.ledger.records import HeartbeatReply, InstanceRecord, InstanceReport, InstanceState, Registration
from megatron_distkv.rblock import InstanceId

# How many dead instances or overdue loans a heartbeat clears on its way.
EXPIRE_PER_HEARTBEAT = 4


class MemoryMembers(LockedState):
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
        with self._lock:
            now = self._clock_ms()
            old = self._state.entries.get(instance)
            if old is not None and 0 < epoch < old.record.epoch:
                raise SupersededError(f"a newer {instance} has registered (epoch {old.record.epoch}, this is {epoch})")
            if old is not None:
                self._state.bury(instance, "replaced")
            self._state.generation = self._state.generation or f"g{now}"
            self._state.epoch = max(self._state.epoch, now if self._state.epoch == 0 else 0)
            is_survivor = epoch > 0 and generation != self._state.generation
            new_epoch = epoch if is_survivor else self._state.epoch + 1
            self._state.epoch = max(self._state.epoch, new_epoch)
            record = InstanceRecord(
                instance, new_epoch, address, total_rblocks, reserved_rblocks, 0, 0, 0, InstanceState.UP, 0, 0, 0, 0,
                dict(info or {}),
            )  # fmt: skip
            self._state.entries[instance] = Entry(record, now + int(lease_s * 1000))
            self._state.note("join", instance=instance, epoch=str(new_epoch))
            return Registration(new_epoch, self._state.generation)

    def heartbeat(self, instance: InstanceId, epoch: int, report: InstanceReport, lease_s: float) -> HeartbeatReply:
        with self._lock:
            now = self._clock_ms()
            if not self._state.is_live(instance, epoch):
                self._state.expire(EXPIRE_PER_HEARTBEAT)
                return HeartbeatReply(known=False)
            entry = self._state.entries[instance]
            entry.lease_end_ms = now + int(lease_s * 1000)
            entry.record = replace(
                entry.record,
                local_used=report.local_used_rblocks,
                state=report.state,
                num_running=report.num_running,
                num_waiting=report.num_waiting,
                max_request_tokens=report.max_request_tokens,
            )
            for placement in report.placements:
                self._state.note_placement(entry, placement)
            self._state.expire(EXPIRE_PER_HEARTBEAT)
            moves, entry.moves = tuple(entry.moves), []
            record = entry.record
            return HeartbeatReply(
                known=True,
                generation=self._state.generation,
                lent=record.lent,
                borrowed=record.borrowed,
                free=record.free_to_lend,
                recalls=self._state.recalls_of(instance),
                moves=moves,
            )

    def describe(self, instance: InstanceId, epoch: int, info: Mapping[str, str]) -> bool:
        with self._lock:
            if not self._state.is_live(instance, epoch):
                return False
            entry = self._state.entries[instance]
            entry.record = replace(entry.record, info=dict(info))
            return True

    def deregister(self, instance: InstanceId, epoch: int) -> None:
        with self._lock:
            if self._state.is_live(instance, epoch):
                self._state.bury(instance, "leave")

    def expire(self, limit: int = 64) -> list[InstanceId]:
        with self._lock:
            return self._state.expire(limit)
