"""What the links to other members cost: measured when they are about to be used, and for a few others at random."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from megatron_distkv.clock import Clock
from megatron_distkv.errors import DistkvError
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import Creditor
from megatron_distkv.log import get_logger

logger = get_logger(__name__)
# So many links are known before any is used, to members drawn at random: enough to know a slow network from a fast one.
NUM_PROBED = 4
# A member that cannot be measured is tried so often.
ATTEMPTS = 3
# How many figures a member publishes, of the links that it has used last.
NUM_PUBLISHED = 8
# How many links to members that lend nothing at the moment are remembered.
MAX_ABSENT = 64


class LinkCost(NamedTuple):
    """Of one debtor's link to one creditor, measured once in the life of both.

    `ask_us`: the questions of one decode step, of all layers, there and back. `fetch_us`: one rBlock on its way back.
    (paper, section 5: fetching back beats asking where
    more decode steps remain than the break-even.)
    """

    round_trip_us: float
    megabytes_per_s: float
    ask_us: float
    fetch_us: float

    @property
    def break_even_steps(self) -> float:
        """Decode steps after which one rBlock, all that a request has there, had better come back at once."""
        return self.fetch_us / self.ask_us


def link_cost(round_trip_s: float, loaded_s: float, load_bytes: int, shape: RBlockShape) -> LinkCost:
    """For one rank of `shape`, from a round trip without a load and one with `load_bytes`.

    On a quick link the two differ by less than round trips do among themselves: the load is taken to need half of its
    round trip at least, so that the bandwidth told is at most twice what was really seen.
    """
    loading_us = max(loaded_s - round_trip_s, loaded_s / 2) * 1e6
    bytes_per_us = load_bytes / loading_us  # a byte per microsecond is a megabyte per second
    round_trip_us = round_trip_s * 1e6
    ask_us = shape.num_layers * (round_trip_us + shape.query_bytes_per_rank / bytes_per_us)
    return LinkCost(round_trip_us, bytes_per_us, ask_us, shape.rblock_bytes / shape.tensor_parallel / bytes_per_us)


class Links:
    """`measure` may take as long as a link is slow, and raises DistkvError; only jobs call `learn`. Any thread reads.

    `publish` gets what is to be told of them, whenever something new is known.
    """

    def __init__(
        self,
        clock: Clock,
        measure: Callable[[Creditor], LinkCost],
        publish: Callable[[dict[str, LinkCost]], None],
    ) -> None:
        self._clock = clock
        self._measure = measure
        self._publish = publish
        self._costs: dict[tuple[str, int], LinkCost] = {}  # by member and epoch, the latest last
        self._failures: dict[tuple[str, int], int] = {}

    def cost_of(self, member: str) -> LinkCost | None:
        """None: not measured (yet)."""
        found = [cost for (name, _), cost in list(self._costs.items()) if name == member]
        return found[-1] if found else None

    def learn(self, creditors: Sequence[Creditor], about_to_use: Collection[str] = ()) -> None:
        """Measure those that are about to be used, and some others until a few are known; forget those that are gone.

        `creditors`: all that this member knows of at the moment.
        """
        self._prune(creditors)
        new = [x for x in creditors if self._is_new(x)]
        wanted = [x for x in new if x.instance in about_to_use]
        others = [x for x in new if x.instance not in about_to_use]
        num_missing = max(0, NUM_PROBED - len(self._costs) - len(wanted))
        wanted += self._clock.random.sample(others, min(num_missing, len(others)))
        measured = [self._try(creditor) for creditor in wanted]
        if any(measured):
            names = [name for name, _ in self._costs][-NUM_PUBLISHED:]
            self._publish({name: cost for name in names if (cost := self.cost_of(name)) is not None})

    def _is_new(self, creditor: Creditor) -> bool:
        life = (creditor.instance, creditor.epoch)
        return life not in self._costs and self._failures.get(life, 0) < ATTEMPTS

    def _try(self, creditor: Creditor) -> bool:
        life = (creditor.instance, creditor.epoch)
        try:
            self._costs[life] = self._measure(creditor)
            return True
        except DistkvError as error:
            logger.info("the link to %s cannot be measured: %s", creditor.instance, error)
            self._failures[life] = self._failures.get(life, 0) + 1
            return False

    def _prune(self, creditors: Sequence[Creditor]) -> None:
        """Creditors that lend nothing now may come back; what is kept of them is bounded."""
        present = {(x.instance, x.epoch) for x in creditors}
        for lives in (self._costs, self._failures):
            absent = [life for life in lives if life not in present]
            for life in absent[: max(0, len(absent) - MAX_ABSENT)]:
                lives.pop(life, None)
