"""A request's rBlocks stay in order, without gap or overlap, wherever they go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_distkv.errors import IntegrityError
from megatron_distkv.kvcache.block_table import MAX_SPAN_RBLOCKS, BlockTable
from megatron_distkv.rblock import InstanceId, LoanId, LocalSpan, RemoteSpan

CREDITOR, LOAN = InstanceId("b"), LoanId("a.1.0")


def local_table(*block_ids: int) -> BlockTable:
    table = BlockTable()
    table.add_local(range(len(block_ids)), block_ids)
    return table


def test_appended_rblocks_form_one_span() -> None:
    table = local_table(7, 3)
    table.add_local(table.missing(range(1, 3)), [5])
    assert table.spans == [LocalSpan(0, (7, 3, 5))]


def test_a_full_span_stays_the_very_same_while_its_request_grows() -> None:
    table = local_table(*range(MAX_SPAN_RBLOCKS))
    (full,) = table.before(MAX_SPAN_RBLOCKS)
    for added in range(3):
        table.add_local([MAX_SPAN_RBLOCKS + added], [added])
    spans = table.before(MAX_SPAN_RBLOCKS + 3)
    assert spans[0].block_ids is full.block_ids
    assert spans[1:] == [LocalSpan(MAX_SPAN_RBLOCKS, (0, 1, 2))]


def test_moving_the_oldest_gives_their_local_ids_back() -> None:
    # Given four local rBlocks, of which three are full
    table = local_table(7, 3, 5, 9)
    # When the two oldest full ones move to a creditor
    oldest = table.oldest_local(2, full=[range(3)])
    left = table.move_to_creditor(0, [40, 41], CREDITOR, LOAN)
    # Then the table names both holders, in order
    assert oldest == [LocalSpan(0, (7, 3))]
    assert left == [7, 3]
    assert table.spans == [RemoteSpan(0, (40, 41), CREDITOR, LOAN), LocalSpan(2, (5, 9))]
    assert table.remote_by_creditor() == {CREDITOR: 2}


def test_a_partly_filled_rblock_never_leaves() -> None:
    assert local_table(7, 3).oldest_local(5, full=[range(1)]) == [LocalSpan(0, (7,))]


def test_a_lost_loan_leaves_a_gap_that_local_rblocks_fill() -> None:
    # Given rBlocks 0, 1 at one creditor, 2 at another, 3, 4 here
    table = local_table(7, 3, 5, 9, 8)
    table.move_to_creditor(0, [40, 41], CREDITOR, LOAN)
    table.move_to_creditor(2, [60], InstanceId("c"), LoanId("a.1.1"))
    # When the first loan is lost
    assert table.remove_loans([LOAN]) == [RemoteSpan(0, (40, 41), CREDITOR, LOAN)]
    # Then the others stay where they are, and none of the gap may leave
    assert table.missing(range(5)) == [0, 1]
    assert table.oldest_local(5, full=[range(2, 5)]) == [LocalSpan(3, (9, 8))]
    assert table.before(4) == [table.spans[0], LocalSpan(3, (9,))]
    # When one rBlock comes back
    table.add_local([0], [7])
    table.check_integrity()
    assert table.missing(range(5)) == [1]
    assert table.spans[0] == LocalSpan(0, (7,))
    assert (table.num_local, table.num_rblocks) == (3, 4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_what_comes_home_is_where_it_was(counts: list[int]) -> None:
    # Given ten rBlocks, of which 2..5 and 7..9 lie at a creditor, 5..7 at another
    table = local_table(*range(100, 110))
    table.move_to_creditor(2, [40, 41, 42], CREDITOR, LOAN)
    table.move_to_creditor(7, [43, 44], CREDITOR, LOAN)
    table.move_to_creditor(5, [60, 61], InstanceId("c"), LoanId("a.1.1"))
    # When they come home a few at a time
    left, fresh = [], iter(range(200, 300))
    for count in counts:
        physical = [next(fresh) for _ in range(min(count, table.num_under(LOAN)))]
        spans = table.make_local(LOAN, physical)
        left += [block_id for span in spans for block_id in span.block_ids]
        table.check_integrity()
    # Then the oldest have come, each once, and the rest lies where it was
    assert left == [40, 41, 42, 43, 44][: len(left)]
    assert table.num_under(LOAN) == 5 - len(left)
    home = [100, 101, *range(200, 205), 109]
    expected = [*home[:2], *[(home[2:7] if i < len(left) else [40, 41, 42, 43, 44])[i] for i in range(5)]]
    expected = [*expected[:5], 60, 61, *expected[5:], 109]
    assert [block_id for span in table.spans for block_id in span.block_ids] == expected


def test_moving_what_is_not_local_is_refused() -> None:
    table = local_table(1, 2)
    table.move_to_creditor(0, [40], CREDITOR, LOAN)
    with pytest.raises(IntegrityError, match="not all local"):
        table.move_to_creditor(0, [41], CREDITOR, LOAN)
    with pytest.raises(IntegrityError, match="not all in the table"):
        table.move_to_creditor(1, [41, 42], CREDITOR, LOAN)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=6))
def test_any_moves_keep_the_order(moves: list[tuple[int, int]]) -> None:
    # Given ten local rBlocks whose physical ids are 100 + their index
    table = local_table(*range(100, 110))
    where = {index: 100 + index for index in range(10)}
    # When runs of them move to loans of their own (moves of what is no longer local are refused whole)
    for number, (first, count) in enumerate(moves):
        count = min(count, 10 - first)
        indices = range(first, first + count)
        physical = [1000 * (number + 1) + index for index in indices]
        if any(where[index] >= 1000 for index in indices):
            with pytest.raises(IntegrityError):
                table.move_to_creditor(first, physical, CREDITOR, LoanId(str(number)))
        else:
            left = table.move_to_creditor(first, physical, CREDITOR, LoanId(str(number)))
            assert left == [where[index] for index in indices]
            where.update(zip(indices, physical, strict=True))
    # Then every rBlock is where it was put
    table.check_integrity()
    assert [block_id for span in table.spans for block_id in span.block_ids] == [where[index] for index in range(10)]
