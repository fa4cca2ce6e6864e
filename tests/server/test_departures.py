"""How quickly a queue moves: remembered for a while, however many there were."""

from megatron_distkv.server.departures import RETRY_AT_MOST_S, WINDOW_S, Departures
from tests.virtual_time.clock import VirtualClock


def test_departures_of_long_ago_are_not_kept() -> None:
    # Given a gateway that serves ten requests a second and never refuses one
    clock = VirtualClock()
    departures = Departures(clock)
    for _ in range(20_000):
        departures.note()
        clock.now_s += 0.1
    # Then it remembers those of the last while only, and knows their rate
    assert len(departures) <= WINDOW_S / 0.1 + 2
    assert departures.retry_after_s(99) == 10


def test_without_departures_it_takes_long() -> None:
    assert Departures(VirtualClock()).retry_after_s(0) == RETRY_AT_MOST_S
