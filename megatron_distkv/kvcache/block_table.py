"""Where each rBlock of one request lies: an ordered list of local and remote spans."""

from collections.abc import Collection, Iterator, Sequence

from msgspec.structs import replace

from megatron_distkv.errors import IntegrityError
from megatron_distkv.rblock import InstanceId, LoanId, LocalSpan, RemoteSpan, Span

# rBlocks of a span at most. A full one stays as it is while its request grows, so that what was made of it, here and at
# other ranks, still holds in the next step.
MAX_SPAN_RBLOCKS = 1024


class BlockTable:
    """Spans of a request's rBlocks in order; neighbouring spans of one holder and loan are kept merged, up to a size.

    New tokens are always local, so the table grows with local rBlocks; migration turns full local rBlocks into remote
    ones, oldest first. A loan that is lost leaves a gap, which local rBlocks fill.
    """

    def __init__(self) -> None:
        self._spans: list[Span] = []

    @property
    def spans(self) -> Sequence[Span]:
        return self._spans

    @property
    def num_rblocks(self) -> int:
        return sum(len(span.block_ids) for span in self._spans)

    @property
    def num_local(self) -> int:
        return sum(len(span.block_ids) for span in self.local_spans())

    def local_spans(self) -> Iterator[LocalSpan]:
        return (span for span in self._spans if isinstance(span, LocalSpan))

    def remote_spans(self) -> Iterator[RemoteSpan]:
        return (span for span in self._spans if isinstance(span, RemoteSpan))

    def local_block_ids(self) -> list[int]:
        return [block_id for span in self.local_spans() for block_id in span.block_ids]

    def remote_by_creditor(self) -> dict[InstanceId, int]:
        """rBlocks at each creditor."""
        counts: dict[InstanceId, int] = {}
        for span in self.remote_spans():
            counts[span.creditor] = counts.get(span.creditor, 0) + len(span.block_ids)
        return counts

    def before(self, num_rblocks: int) -> list[Span]:
        """The spans of rBlocks `0 .. num_rblocks`."""
        return [cut for span in self._spans if (cut := _cut(span, range(num_rblocks))) is not None]

    def missing(self, rblocks: range) -> list[int]:
        """Which of these rBlocks lie nowhere."""
        left = set(rblocks)
        for span in self._spans:
            end = span.first + len(span.block_ids)
            left.difference_update(range(max(span.first, rblocks.start), min(end, rblocks.stop)))
        return sorted(left)

    def add_local(self, rblocks: Sequence[int], block_ids: Sequence[int]) -> None:
        """rBlocks that lay nowhere lie here now, under these physical ids."""
        if not block_ids:
            return
        added = [LocalSpan(first, (block_id,)) for first, block_id in zip(rblocks, block_ids, strict=True)]
        self._spans = sorted([*self._spans, *added], key=lambda span: span.first)
        self._merge_neighbours()

    def add_remote(self, first: int, block_ids: Sequence[int], creditor: InstanceId, loan_id: LoanId) -> None:
        """rBlocks `first ..` that lay nowhere lie at `creditor` now."""
        if block_ids:
            added = RemoteSpan(first, tuple(block_ids), creditor, loan_id)
            self._spans = sorted([*self._spans, added], key=lambda span: span.first)
            self._merge_neighbours()

    def oldest_local(self, count: int, full: Sequence[range]) -> list[LocalSpan]:
        """Up to `count` of the oldest local rBlocks among the `full` ones (no other may leave)."""
        found: list[LocalSpan] = []
        for span in self.local_spans():
            for rblocks in full:
                movable = _cut(span, rblocks)
                if isinstance(movable, LocalSpan) and count > 0:
                    found.append(LocalSpan(movable.first, movable.block_ids[:count]))
                    count -= len(found[-1].block_ids)
        return found

    def block_ids_under(self, loan_id: LoanId) -> list[int]:
        """rBlocks that lie at a creditor under this loan, as it names them."""
        return [block_id for span in self.remote_spans() if span.loan_id == loan_id for block_id in span.block_ids]

    def num_under(self, loan_id: LoanId) -> int:
        return len(self.block_ids_under(loan_id))

    def make_local(self, loan_id: LoanId, block_ids: Sequence[int]) -> list[RemoteSpan]:
        """The oldest rBlocks under this loan lie here now, under these physical ids; returns where they lay."""
        left: list[RemoteSpan] = []
        spans: list[Span] = []
        for span in self._spans:
            count = min(len(span.block_ids), len(block_ids) - sum(len(x.block_ids) for x in left))
            if not isinstance(span, RemoteSpan) or span.loan_id != loan_id or count == 0:
                spans.append(span)
                continue
            start = sum(len(x.block_ids) for x in left)
            left.append(replace(span, block_ids=span.block_ids[:count]))
            spans.append(LocalSpan(span.first, tuple(block_ids[start : start + count])))
            if span.block_ids[count:]:
                spans.append(replace(span, first=span.first + count, block_ids=span.block_ids[count:]))
        self._spans = spans
        self._merge_neighbours()
        return left

    def rename_loan(self, loan_id: LoanId, new_loan_id: LoanId) -> None:
        self._spans = [
            replace(span, loan_id=new_loan_id) if isinstance(span, RemoteSpan) and span.loan_id == loan_id else span
            for span in self._spans
        ]

    def remove_loans(self, loan_ids: Collection[LoanId]) -> list[RemoteSpan]:
        """What lay at creditors under these loans lies nowhere now."""
        lost = [span for span in self.remote_spans() if span.loan_id in loan_ids]
        self._spans = [x for x in self._spans if isinstance(x, LocalSpan) or x.loan_id not in loan_ids]
        return lost

    def move_to_creditor(
        self, first: int, block_ids: Sequence[int], creditor: InstanceId, loan_id: LoanId
    ) -> list[int]:
        """rBlocks `first ..` now lie at `creditor` under these physical ids; returns the local ids that they leave."""
        moved = RemoteSpan(first, tuple(block_ids), creditor, loan_id)
        end = first + len(block_ids)
        left: list[int] = []
        spans: list[Span] = []
        for span in self._spans:
            span_end = span.first + len(span.block_ids)
            if span_end <= first or end <= span.first:
                spans.append(span)
                continue
            if not isinstance(span, LocalSpan):
                raise IntegrityError(f"rBlocks {first}..{end} are not all local")
            cut_from, cut_to = max(first - span.first, 0), min(end, span_end) - span.first
            left.extend(span.block_ids[cut_from:cut_to])
            spans.extend(_pieces_around(span, cut_from, cut_to))
        if len(left) != len(block_ids):
            raise IntegrityError(f"rBlocks {first}..{end} are not all in the table")
        self._spans = sorted([*spans, moved], key=lambda span: span.first)
        self._merge_neighbours()
        return left

    def check_integrity(self) -> None:
        """In order, none empty, none over another."""
        free_from = 0
        for span in self._spans:
            if span.first < free_from or not span.block_ids:
                raise IntegrityError(f"span starts at rBlock {span.first}, expected {free_from} or later")
            free_from = span.first + len(span.block_ids)

    def _merge_neighbours(self) -> None:
        merged: list[Span] = []
        for span in self._spans:
            joined = _join(merged[-1], span) if merged else None
            if joined is None:
                merged.append(span)
            else:
                merged[-1] = joined
        self._spans = merged


def _pieces_around(span: LocalSpan, cut_from: int, cut_to: int) -> list[LocalSpan]:
    before = LocalSpan(span.first, span.block_ids[:cut_from])
    after = LocalSpan(span.first + cut_to, span.block_ids[cut_to:])
    return [piece for piece in (before, after) if piece.block_ids]


def _cut(span: Span, rblocks: range) -> Span | None:
    """The part of `span` that lies in `rblocks`."""
    start = max(rblocks.start - span.first, 0)
    if start == 0 and span.first + len(span.block_ids) <= rblocks.stop:
        return span
    block_ids = span.block_ids[start : max(rblocks.stop - span.first, 0)]
    return replace(span, first=span.first + start, block_ids=block_ids) if block_ids else None


def _join(left: Span, right: Span) -> Span | None:
    num_left = len(left.block_ids)
    if left.first + num_left != right.first or num_left + len(right.block_ids) > MAX_SPAN_RBLOCKS:
        return None
    match left, right:
        case LocalSpan(), LocalSpan():
            return LocalSpan(left.first, left.block_ids + right.block_ids)
        case RemoteSpan(), RemoteSpan() if left.loan_id == right.loan_id:
            return RemoteSpan(left.first, left.block_ids + right.block_ids, left.creditor, left.loan_id)
    return None
