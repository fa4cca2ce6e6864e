"""Reports of chaos runs as Markdown: `python -m tools.bench.chaos_report FILE...`, for docs/experiments.md."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

_COLUMNS = ("seed", "minutes", "requests", "tokens", "faults", "lost", "mismatches", "leaks", "refused", "left",
            "computed again", "of starting over", "longest pause")  # fmt: skip


def as_markdown(reports: list[dict[str, Any]]) -> str:
    """A row for each run, then the faults of all of them by kind, and where they ran."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---:|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(_row(report)) + " |" for report in reports]
    faults: Counter[str] = Counter()
    for report in reports:
        faults.update(report["faults"])
    total = ", ".join(f"{count} x {kind}" for kind, count in faults.most_common())
    pools = {_pool(report): None for report in reports}
    machines = {report["machine"]: None for report in reports}
    facts = {"Faults": total, "Pool": "; ".join(pools), "Machine": "; ".join(machines)}
    return "\n".join([*lines, "", *(f"{name}: {fact}." for name, fact in facts.items())])


def _row(report: dict[str, Any]) -> list[str]:
    again, over = report["recomputed_tokens"], report["full_recompute_tokens"]
    counts = [report["requests"], report["tokens"], sum(report["faults"].values()), report["lost"]]
    counts += [report["mismatches"], len(report["leaks"]), sum(report["refused"].values()), report["left_by_client"]]
    share = f"{again / over:.0%}" if over else "-"
    return [
        f"{report['seed']}", f"{report['minutes']:g}", *(f"{count:,}" for count in counts), f"{again:,}", share,
        f"{report['longest_pause_s']:.1f} s",
    ]  # fmt: skip


def _pool(report: dict[str, Any]) -> str:
    cluster = report["cluster"]
    cache = cluster["kv_cache"]
    instances = f"{cluster['instances']} instances of {cache['num_rblocks']} rBlocks of {cache['rblock_size']} tokens"
    lenders = f", lenders: {cluster['lenders']} of {cluster['lender_rblocks']} rBlocks" if cluster["lenders"] else ""
    return f"{instances}{lenders}, {report['clients']} clients"


if __name__ == "__main__":
    print(as_markdown([json.loads(Path(name).read_text()) for name in sys.argv[1:]]))
