"""Places of open rBlocks: each request that runs or is to come has exactly one, and none is lost, in any order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from megatron_distkv.errors import IntegrityError
from megatron_distkv.kvcache.open_slots import OpenSlots

NUM_OWN = 3
NAMES = st.sampled_from([f"r{number}" for number in range(8)])


class SlotsMachine(RuleBasedStateMachine):
    """Requests that come, run twice, are handed over, go; `held` is what each was told."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = OpenSlots(NUM_OWN)
        self.own: dict[str, int | None] = {}
        self.handed_over: dict[str, int | None] = {}

    @property
    def held(self) -> dict[str, int | None]:
        return {**self.own, **self.handed_over}

    @rule(name=NAMES)
    def run(self, name: str) -> None:
        if name not in self.held and len(self.own) == NUM_OWN:
            with pytest.raises(IntegrityError, match="more than 3 running requests"):
                self.slots.take(name)
            return
        self.slots.take(name)
        if name not in self.held:
            self.own[name] = self.slots.slot_of(name)

    @rule(name=NAMES)
    def prepare(self, name: str) -> None:
        handover_id = f"coming {name}"
        had = handover_id in self.handed_over
        is_granted = self.slots.reserve(handover_id)
        assert is_granted == (had or len(self.handed_over) < NUM_OWN)
        if is_granted:
            self.handed_over[handover_id] = self.slots.slot_of(handover_id)

    @precondition(lambda self: any(x.startswith("coming") for x in self.handed_over))
    @rule(name=NAMES)
    def come(self, name: str) -> None:
        if name not in self.held:
            handover_id = next(x for x in self.handed_over if x.startswith("coming"))
            self.slots.rename(handover_id, name)
            self.handed_over[name] = self.handed_over.pop(handover_id)

    @rule(name=NAMES)
    def end(self, name: str) -> None:
        self.slots.give_back(name)
        self.own.pop(name, None)
        self.handed_over.pop(name, None)

    @invariant()
    def nobody_shares_a_place_and_nobody_loses_it(self) -> None:
        self.slots.check_integrity(self.held)
        assert len(set(self.held.values())) == len(self.held)
        assert all(self.slots.slot_of(name) == slot for name, slot in self.held.items())
        with pytest.raises(IntegrityError):
            self.slots.check_integrity([*self.held, "a stranger"])


TestSlots = SlotsMachine.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_where_nobody_needs_a_place_everybody_gets_none() -> None:
    slots = OpenSlots(None)
    slots.take("a")
    assert slots.reserve("b")
    slots.rename("b", "c")
    assert (slots.slot_of("a"), slots.num_slots) == (None, 0)
    slots.give_back("a")
    slots.check_integrity(["whoever"])
