"""Which instance a request goes to: the one with least work, by tokens and not by requests."""

from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.messages import TokenOutput
from megatron_distkv.sampling_params import SamplingParams
from megatron_distkv.server.admission import Admission
from megatron_distkv.server.attempt import Attempt
from tests.server.still_view import StillView, member
from tests.virtual_time.clock import VirtualClock


class Gateway:
    """Gives requests to two large instances, as long as nobody ends."""

    def __init__(self) -> None:
        self.view = StillView()
        self.clock = VirtualClock()
        self.members = {name: member(name, 100_000) for name in ("a", "b")}
        self.admission = Admission(AdmissionConfig(), self.view, self.clock)
        self.view.show(*self.members.values())

    def heartbeat(self, **reports: dict[str, int]) -> None:
        """What the instances have from all gateways."""
        self.view.show(*(member(name, 100_000, **reports.get(name, {})) for name in ("a", "b")))

    def place(self, num_tokens: int) -> tuple[Attempt, str]:
        attempt, place = Attempt([1] * num_tokens, SamplingParams(max_tokens=50), None, self.clock), Place()
        self.admission.enter(attempt, place)
        attempt.request(self.members[place.at])
        return attempt, place.at

    def first_token(self, attempt: Attempt) -> None:
        attempt.note(TokenOutput(attempt.request_id, [7]))
        self.admission.note_prefilled(attempt)


class Place:
    at = ""

    def done(self) -> bool:
        return bool(self.at)

    def set_result(self, member: object, /) -> None:
        self.at = member.instance  # type: ignore[attr-defined]


def test_short_requests_go_where_no_long_prompt_is_computed() -> None:
    # Given a prompt of 100k tokens at one of two instances
    gateway = Gateway()
    long, busy = gateway.place(100_000)
    other = {"a": "b", "b": "a"}[busy]
    # When short ones come, then they go to the other one, however many it has
    assert {gateway.place(200)[1] for _ in range(20)} == {other}
    # And when its prompt is computed, it is one request that decodes, and those that come are its instance's
    gateway.first_token(long)
    assert {gateway.place(200)[1] for _ in range(8)} == {busy}


def test_equal_requests_are_shared_out_and_what_ends_counts_no_more() -> None:
    gateway = Gateway()
    placed = [gateway.place(300) for _ in range(10)]
    assert sorted(at for _, at in placed) == ["a"] * 5 + ["b"] * 5
    # When all of one instance decode, and those of the other end
    for attempt, at in placed:
        if at == "a":
            gateway.first_token(attempt)
        else:
            gateway.admission.end(attempt)
    # Then the one without work comes first, until it has as much
    assert [gateway.place(100)[1] for _ in range(2)] == ["b"] * 2
    assert gateway.place(100)[1] == "a"


def test_a_lost_request_is_a_prompt_again() -> None:
    gateway = Gateway()
    attempt, at = gateway.place(5_000)
    gateway.first_token(attempt)
    gateway.admission.end(attempt)
    attempt.note_lost(gateway.members[at])
    taken = gateway.admission.place_at_once(attempt)
    assert taken is not None
    assert attempt.num_prefill_tokens == 5_001
    assert {gateway.place(100)[1] for _ in range(3)} == {at} != {taken.instance}


def test_another_gateways_long_prompt_counts_as_ones_own() -> None:
    # Given a prompt of 100k tokens that one of two gateways has given to an instance
    one, other = Gateway(), Gateway()
    long, busy = one.place(100_000)
    # When the instance has told so
    for gateway in (one, other):
        gateway.heartbeat(**{busy: {"running": 1, "prefill_left": 90_000}})
    # Then both send short ones to the other instance, however many
    free = {"a": "b", "b": "a"}[busy]
    assert {gateway.place(200)[1] for _ in range(20) for gateway in (one, other)} == {free}
    # And when the prompt is computed, both come back
    one.first_token(long)
    for gateway in (one, other):
        gateway.heartbeat(**{busy: {"running": 1}, free: {"running": 40}})
        assert gateway.place(200)[1] == busy


def test_what_has_ended_since_a_report_counts_no_more() -> None:
    gateway = Gateway()
    attempt, at = gateway.place(5_000)
    gateway.heartbeat(**{at: {"running": 2, "prefill_left": 5_000}})
    # When the other gateway's decodes on, and this one's ends
    gateway.admission.end(attempt)
    # Then this instance has one request, and the next goes to the other one before it comes back here
    other = {"a": "b", "b": "a"}[at]
    assert [gateway.place(1)[1] for _ in range(2)] == [other, at]
