"""Who would lend to this instance, and how much the pool could give it: now, and at most."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_distkv.ledger import CreditorOffer, DebtLedger
from megatron_distkv.log import get_logger
from megatron_distkv.pool.links import Links
from megatron_distkv.pool.member import MemberInfo, MemberUnreadable, read_info
from megatron_distkv.pool.membership import Membership
from megatron_distkv.pool.quarantine import Quarantine

logger = get_logger(__name__)
# A creditor whose MicroAttention takes this many times as long as the quickest one's is asked last.
SLOW = 4.0
# How much is asked of a creditor at a time, for comparisons.
ASKED_RBLOCKS = 16
# How many creditors one answer of the ledger names.
PAGE = 64
# Of how many it is known what they cost, also when they lend nothing more.
MOST_REMEMBERED = 4 * PAGE


@dataclass(frozen=True)
class Candidate:
    """A creditor, and what it says of itself."""

    creditor: CreditorOffer
    info: MemberInfo

    @property
    def name(self) -> str:
        return self.creditor.instance


class Candidates:
    """Jobs ask the ledger (`look`); everybody else reads what they found. With `enabled` False nothing is ever lent.

    `cooldown`: members that are not asked for memory for a while; `lost`: those whose channels were lost.
    """

    def __init__(
        self,
        ledger: DebtLedger,
        membership: Membership,
        links: Links,
        cooldown: Quarantine,
        lost: Quarantine,
        *,
        enabled: bool,
    ) -> None:
        self._ledger = ledger
        self._membership = membership
        self._links = links
        self._cooldown = cooldown
        self._lost = lost
        self._enabled = enabled
        self._seen: tuple[Candidate, ...] = ()
        self._latest: dict[str, Candidate] = {}  # by name, of those seen now or before
        self._num_not_understood = 0  # rBlocks of creditors of other versions

    # ------------------------------------------------------------------ jobs

    def look(self, num_rblocks: float) -> list[Candidate]:
        """Creditors for `num_rblocks` (infinity: all), best first; a page of them at least, if there are so many.

        Raises LedgerUnavailable.

        Those whose answers would take much longer than the quickest one's, the link included, come last; before them
        lenders, which have no requests of their own to slow down, then instances; the freest of each first.
        """
        named: list[CreditorOffer] = []
        readable: list[Candidate] = []
        num_lendable = 0
        while True:
            page = self._ledger.recommend(self._membership.identity.instance, PAGE, skip=len(named))
            named += page
            read = [x for x in map(_read, page) if x is not None]
            readable += read
            num_lendable += sum(x.creditor.free_rblocks for x in read if not self._is_left_alone(x))
            if len(page) < PAGE or num_lendable >= num_rblocks:
                break
        self._seen = tuple(readable)
        self._remember(readable)
        self._num_not_understood = _num_free(named) - _num_free([x.creditor for x in readable])
        return self._in_order_of_use([x for x in readable if not self._is_left_alone(x)])

    def _remember(self, readable: Sequence[Candidate]) -> None:
        """Who has lent all is named no more by the ledger, and still holds what it has lent."""
        new = {candidate.name: candidate for candidate in readable}
        before = [item for item in self._latest.items() if item[0] not in new]
        self._latest = dict([*before, *new.items()][-MOST_REMEMBERED:])

    def probe_links(self) -> None:
        """Know what a few links cost before any is used; nothing once they are. Raises LedgerUnavailable."""
        if not self._links.are_enough:
            self.look(0)
            self.learn_links()

    def learn_links(self, about_to_use: tuple[str, ...] = ()) -> None:
        self._links.learn([x.creditor for x in self._seen], about_to_use)

    # ------------------------------------------------------------------ what is known

    @property
    def ledger_round_trip_s(self) -> float:
        return self._membership.round_trip_s

    @property
    def borrowable_rblocks(self) -> int:
        """rBlocks that all others together would lend now; who cannot be asked does not count."""
        left_alone = _num_free([x.creditor for x in self._seen if self._is_left_alone(x)]) + self._num_not_understood
        return max(0, self._membership.totals.lendable_now - left_alone) if self._enabled else 0

    @property
    def max_borrowable_rblocks(self) -> int:
        """rBlocks that all others together may lend at most."""
        return self._membership.totals.lending_caps if self._enabled else 0

    def host_memory_is_slow(self, lent_already: Collection[str] = ()) -> bool:
        """Whether own host memory answers so much later than some creditor that it comes after them.

        `lent_already`: creditors of loans with room in them, whatever else they would lend.
        """
        own_us = self._membership.info.host_query_us
        if own_us is None:
            return False
        have_room = [x for x in self._seen if x.creditor.free_rblocks > 0]
        have_room += [self._latest[name] for name in lent_already if name in self._latest]
        others = [x for x in have_room if x.info.query_us is not None]
        return ASKED_RBLOCKS * own_us > SLOW * min(map(self._answer_us, others), default=float("inf"))

    def is_lost(self, creditor: str) -> bool:
        """A channel to it was lost, a short time ago."""
        return self._lost.holds(creditor)

    def _is_left_alone(self, candidate: Candidate) -> bool:
        return self._cooldown.holds(candidate.name) or self.is_lost(candidate.name)

    def _in_order_of_use(self, found: list[Candidate]) -> list[Candidate]:
        costs_us = {x.name: self._answer_us(x) for x in found if x.info.query_us is not None}
        slow_us = SLOW * min(costs_us.values(), default=float("inf"))

        def rank(candidate: Candidate) -> tuple[bool, bool, int]:
            is_slow = costs_us.get(candidate.name, 0.0) > slow_us
            return is_slow, candidate.info.role == "instance", -candidate.creditor.free_rblocks

        return sorted(found, key=rank)

    def _answer_us(self, candidate: Candidate) -> float:
        """Of one decode step, with a few rBlocks there.

        A link that is not measured yet costs as much as the best that is: if it cost nothing, whoever is measured
        would look slow beside it.
        """
        link = self._links.cost_of(candidate.name) or self._links.best
        return ASKED_RBLOCKS * (candidate.info.query_us or 0.0) + (0.0 if link is None else link.ask_us)


def _num_free(creditors: Sequence[CreditorOffer]) -> int:
    return sum(creditor.free_rblocks for creditor in creditors)


def _read(creditor: CreditorOffer) -> Candidate | None:
    """None: another version, or garbage; nobody lends from whom nothing is understood."""
    try:
        return Candidate(creditor, read_info(creditor.info))
    except MemberUnreadable as error:
        logger.debug("%s is no creditor: %s", creditor.instance, error)
        return None
