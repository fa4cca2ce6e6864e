"""What /metrics says of the pool's members: made anew for each scrape, so a member that is gone is gone."""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from megatron_distkv.messages import Counted, InstanceStatus
from megatron_distkv.metrics import INSTANCE_REGISTRY
from megatron_distkv.pool import Member

# A scrape waits so long for instances to tell their counts; one in a long step is shown as it was when it told last.
STATUS_WITHIN_S = 1.0


class PoolMetrics(Collector):
    """Gauges and lenders' counts, of the ledger's picture, and the counts of this gateway's instances.

    All are labelled by `instance`, counters also by `rank`. A counter begins anew with its member: Prometheus takes a
    lower value for a restart.
    """

    def __init__(self, members: Sequence[Member], statuses: Sequence[InstanceStatus]) -> None:
        self._members = members
        self._statuses = statuses

    def collect(self) -> Iterator[Metric]:
        yield self._rblocks()
        yield self._requests()
        yield from self._counts()

    def _rblocks(self) -> Metric:
        what = "rBlocks of a member, by state: `free`, `used`, `lent`, `borrowed`"
        family = GaugeMetricFamily("distkv_rblocks", what, labels=["instance", "state"])
        for x in self._members:
            _add(family, x, {"free": x.free, "used": x.local_used, "lent": x.lent, "borrowed": x.borrowed}.items())
        return family

    def _requests(self) -> Metric:
        what = "Requests in a member, by state: `running`, `waiting`"
        family = GaugeMetricFamily("distkv_instance_requests", what, labels=["instance", "state"])
        for x in self._members:
            _add(family, x, {"running": x.num_running, "waiting": x.num_waiting}.items())
        return family

    def _counts(self) -> Iterator[Metric]:
        """Of the kinds that this version knows."""
        for known in INSTANCE_REGISTRY.collect():
            family = Metric(known.name, known.documentation, known.type)
            for instance, count in self._counted():
                if count.name == f"{known.name}_total":
                    labels = {**count.labels, "instance": instance, "rank": str(count.rank)}
                    family.add_sample(count.name, labels, count.value)
            yield family

    def _counted(self) -> Iterator[tuple[str, Counted]]:
        """By member: an instance tells its gateways, a lender the ledger."""
        for status in self._statuses:
            yield from ((status.instance_id, count) for count in status.counted)
        for member in self._members:
            yield from ((member.instance, count) for count in member.counted)


def _add(family: GaugeMetricFamily, record: Member, counts: Iterable[tuple[str, int]]) -> None:
    for state, count in counts:
        family.add_metric([record.instance, state], count)
