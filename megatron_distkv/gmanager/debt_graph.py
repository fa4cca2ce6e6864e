"""Who owes whom, as a graph: debtor -> creditor, weighted in rBlocks. Pure."""

from collections.abc import Iterable

from megatron_distkv.ledger import Loan
from megatron_distkv.rblock import InstanceId

DebtGraph = dict[InstanceId, dict[InstanceId, int]]


def debt_graph(loans: Iterable[Loan]) -> DebtGraph:
    graph: DebtGraph = {}
    for loan in loans:
        debts = graph.setdefault(loan.debtor, {})
        debts[loan.creditor] = debts.get(loan.creditor, 0) + loan.num_rblocks
    return graph


def find_cycle(graph: DebtGraph) -> list[InstanceId] | None:
    """A circle of debtors (the first named again at the end), or None. The ledger grants none: a circle is an alarm."""
    done: set[InstanceId] = set()
    for start in graph:
        found = _walk(graph, start, [], done)
        if found is not None:
            return found
    return None


def _walk(graph: DebtGraph, node: InstanceId, path: list[InstanceId], done: set[InstanceId]) -> list[InstanceId] | None:
    if node in path:
        return [*path[path.index(node) :], node]
    if node in done:
        return None
    for creditor in graph.get(node, {}):
        found = _walk(graph, creditor, [*path, node], done)
        if found is not None:
            return found
    done.add(node)
    return None
