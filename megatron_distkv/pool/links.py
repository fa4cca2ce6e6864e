"""What the links to other members cost: measured when they are about to be used, and for a few others at random."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from megatron_distkv.clock import Clock
from megatron_distkv.errors import DistkvError
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger import CreditorOffer
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
    Fetching back beats asking where more decode steps remain than the break-even (paper, section 5).
    """

    round_trip_us: float
    megabytes_per_s: float
    ask_us: float
    fetch_us: float

    @property
    def break_even_steps(self) -> float:
        """Decode steps after which one rBlock, all that a request has there, had better come back at once."""
        return self.fetch_us / self.ask_us


class _Known(NamedTuple):
    """Of one life of a member."""

    epoch: int
    cost: LinkCost


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
        measure: Callable[[CreditorOffer], LinkCost],
        publish: Callable[[dict[str, LinkCost]], None],
    ) -> None:
        self._clock = clock
        self._measure = measure
        self._publish = publish
        self._known: dict[str, _Known] = {}  # by member, the latest last
        self._failures: dict[tuple[str, int], int] = {}  # by member and epoch

    def cost_of(self, member: str) -> LinkCost | None:
        """None: not measured (yet)."""
        known = self._known.get(member)
        return None if known is None else known.cost

    @property
    def best(self) -> LinkCost | None:
        """Of those measured, the one that is quickest to ask; None: none is."""
        return min((known.cost for known in list(self._known.values())), key=lambda cost: cost.ask_us, default=None)

    @property
    def are_enough(self) -> bool:
        """Whether as many are known as shall be before any is used."""
        return len(self._known) >= NUM_PROBED

    def learn(self, creditors: Sequence[CreditorOffer], about_to_use: Collection[str] = ()) -> None:
        """Measure those that are about to be used, and some others until a few are known; forget those that are gone.

        `creditors`: all that this member knows of at the moment.
        """
        self._prune(creditors)
        new = [x for x in creditors if self._is_new(x)]
        wanted = [x for x in new if x.instance in about_to_use]
        others = [x for x in new if x.instance not in about_to_use]
        num_missing = max(0, NUM_PROBED - len(self._known) - len(wanted))
        wanted += self._clock.random.sample(others, min(num_missing, len(others)))
        measured = [self._try(creditor) for creditor in wanted]
        if any(measured):
            latest = list(self._known.items())[-NUM_PUBLISHED:]
            self._publish({member: known.cost for member, known in latest})

    def _is_new(self, creditor: CreditorOffer) -> bool:
        known = self._known.get(creditor.instance)
        is_known = known is not None and known.epoch == creditor.epoch
        return not is_known and self._failures.get((creditor.instance, creditor.epoch), 0) < ATTEMPTS

    def _try(self, creditor: CreditorOffer) -> bool:
        life = (creditor.instance, creditor.epoch)
        try:
            cost = self._measure(creditor)
            self._known.pop(creditor.instance, None)  # the latest last
            self._known[creditor.instance] = _Known(creditor.epoch, cost)
            return True
        except DistkvError as error:
            logger.info("the link to %s cannot be measured: %s", creditor.instance, error)
            self._failures[life] = self._failures.get(life, 0) + 1
            return False

    def _prune(self, creditors: Sequence[CreditorOffer]) -> None:
        """Creditors that lend nothing now may come back; what is kept of them is bounded."""
        present = {(x.instance, x.epoch) for x in creditors}
        for member, _ in _too_old([(member, known.epoch) for member, known in self._known.items()], present):
            self._known.pop(member, None)
        for life in _too_old(list(self._failures), present):
            self._failures.pop(life, None)


def _too_old(lives: Sequence[tuple[str, int]], present: Collection[tuple[str, int]]) -> Sequence[tuple[str, int]]:
    """The first of those that are not present, all but the last few."""
    absent = [life for life in lives if life not in present]
    return absent[: max(0, len(absent) - MAX_ABSENT)]
