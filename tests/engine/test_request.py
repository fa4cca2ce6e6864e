"""Which positions of a request have their KV, after any losses and recomputations."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_distkv.request import Request
from megatron_distkv.sampling_params import SamplingParams

LENGTH = 40
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("lose"), st.integers(0, LENGTH), st.integers(0, LENGTH)),
        st.tuples(st.just("compute"), st.integers(1, 12), st.just(0)),
    ),
    max_size=12,
)


def request(num_computed: int = 0) -> Request:
    return Request("r", list(range(LENGTH)), SamplingParams(), num_computed_tokens=num_computed)


def test_a_lost_range_comes_first_and_then_the_rest() -> None:
    one = request(num_computed=30)
    one.lose(range(8, 16))
    assert (one.next_range, one.num_to_compute, one.num_recomputed_tokens) == (range(8, 16), 18, 8)
    one.note_computed(5)
    assert one.next_range == range(13, 16)
    one.note_computed(3)
    assert (one.next_range, one.num_to_compute) == (range(30, 40), 10)


def test_a_range_lost_again_while_it_recovers_counts_once_more() -> None:
    one = request(num_computed=30)
    one.lose(range(8, 16))
    one.note_computed(5)
    one.lose(range(16))
    assert (one.lost_ranges, one.num_recomputed_tokens) == ([range(16)], 8 + 13)


def test_a_loss_up_to_the_newest_token_is_no_gap() -> None:
    one = request(num_computed=24)
    one.lose(range(16, 24))
    assert (one.num_computed_tokens, one.lost_ranges) == (16, [])


@given(EVENTS)
def test_positions_are_those_of_a_set(events: list[tuple[str, int, int]]) -> None:
    # Given a set of positions that have their KV, as the model of it
    one, have, recomputed = request(), set[int](), 0
    for what, x, y in events:
        if what == "lose":
            gone = range(min(x, y), min(max(x, y), one.num_computed_tokens))
            recomputed += len(have & set(gone))
            have -= set(gone)
            one.lose(gone)
        else:
            chunk = one.next_range[:x]
            # Then what is computed next has all its past
            assert set(range(chunk.start)) <= have
            assert not set(chunk) & have
            have |= set(chunk)
            one.note_computed(len(chunk))
        # Then both agree, and ranges are in order, apart and not empty
        assert {position for piece in one.computed_ranges() for position in piece} == have
        assert one.num_to_compute == LENGTH - len(have)
        assert one.num_recomputed_tokens == recomputed
        edges = [edge for lost in one.lost_ranges for edge in (lost.start, lost.stop)]
        assert sorted(set(edges)) == edges
