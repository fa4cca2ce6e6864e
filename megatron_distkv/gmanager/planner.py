"""From a snapshot of the pool to moves of KV: greedy and pure, so that a simulator can run the same code.

Debtors are instances where requests wait while a long one fills the memory, fewest running requests first (their
batch gains most from room). Each debtor's longest request is paired with the freest creditor, as in Infinite-LLM.
Ours, and simpler than the paper's: the gain is counted in rBlocks made free, not by a fitted model of step times.
"""

from megatron_distkv.ledger import InstanceState, MoveOrder, RequestPlacementEntry
from megatron_distkv.pool import Member, Picture

# Below this share of free memory an instance with waiting requests is a debtor.
DEBTOR_FREE_SHARE = 0.25
# A creditor keeps this share of what it could lend: its own requests grow too, and plans must not swing.
CREDITOR_KEEPS_SHARE = 0.25
# Moves of fewer rBlocks are not worth a message per step for the rest of the request's life.
MIN_MOVED_RBLOCKS = 4


def plan(picture: Picture) -> list[MoveOrder]:
    """At most one move per debtor and per creditor and plan."""
    creditors = sorted(filter(_may_lend, picture.live), key=lambda record: -record.free_to_lend)
    moves = []
    for debtor in sorted(filter(_is_debtor, picture.live), key=lambda record: record.num_running):
        entry = _longest_local(picture, debtor)
        creditor = next((record for record in creditors if record.instance != debtor.instance), None)
        if entry is None or creditor is None:
            continue
        count = min(entry.num_rblocks // 2, int(creditor.free_to_lend * (1 - CREDITOR_KEEPS_SHARE)))
        if count >= MIN_MOVED_RBLOCKS:
            moves.append(MoveOrder(entry.request_id, debtor.instance, creditor.instance, count))
            creditors.remove(creditor)
    return moves


def _is_debtor(record: Member) -> bool:
    return record.num_waiting > 0 and record.free < DEBTOR_FREE_SHARE * record.total


def _may_lend(record: Member) -> bool:
    is_free = record.num_waiting == 0 and record.borrowed == 0 and record.free_to_lend > 0
    return is_free and record.state is InstanceState.UP


def _longest_local(picture: Picture, debtor: Member) -> RequestPlacementEntry | None:
    local = [entry for entry in picture.placements.get(debtor.instance, ()) if entry.is_local]
    return max(local, key=lambda entry: entry.num_rblocks, default=None)
