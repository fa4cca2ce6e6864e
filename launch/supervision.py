"""Looks after the parts of a running pool: starts those again that have ended by themselves."""

import signal

from megatron_distkv.launch.local_cluster import LocalCluster
from megatron_distkv.launch.supervisor import Ended, Supervisor

from megatron_distkv.errors import UserError

# Of a part that could not even be started.
NOT_STARTED = 2


class Supervision:
    """`look(now_s)` again and again, from the thread that has started the cluster."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._supervisor = Supervisor(cluster.part_names, cluster.say, cluster.config.start_timeout_s)

    @property
    def has_seen_failure(self) -> bool:
        return self._supervisor.has_seen_failure

    def look(self, now_s: float) -> None:
        for name in filter(self._supervisor.may_end, self._cluster.part_names):
            if (ended := self._cluster.ended(name)) is not None:
                self._supervisor.note_ended(name, ended, now_s)
        for name in self._supervisor.overdue(now_s):
            self._cluster.kill(name)
            cause = f"it was not ready within {self._cluster.config.start_timeout_s:g} s"
            self._supervisor.note_ended(name, Ended(-signal.SIGKILL, cause), now_s)
        for name in filter(self._cluster.is_ready, self._supervisor.starting()):
            self._supervisor.note_ready(name, now_s)
        for name in self._supervisor.due(now_s):
            self._start(name, now_s)

    def _start(self, name: str, now_s: float) -> None:
        try:
            self._cluster.restart(name)
        except (UserError, OSError) as error:
            self._supervisor.note_ended(name, Ended(NOT_STARTED, str(error)), now_s)
        else:
            self._supervisor.note_started(name, now_s)
