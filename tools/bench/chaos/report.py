"""Reports of chaos runs as Markdown: `python -m tools.bench.chaos.report FILE...`, for docs/experiments.md."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

_COLUMNS = ("seed", "minutes", "requests", "answers", "tokens", "faults", "lost", "differ", "leaks", "failures",
            "refused", "left", "retried", "computed again", "of starting over", "longest pause",
            "log-prob error", "memory", "files")  # fmt: skip


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
    facts = {"Faults": total or "none", "Pool": "; ".join(pools), "Machine": "; ".join(machines)}
    facts["Columns"] = (
        "differ: answers that are not the reference's; log-prob error: the greatest; memory, files: the greatest "
        "growth of a process in its life after the warm-up"
    )
    wrong = [f"- {sentence}" for report in reports for sentence in _failures(report)]
    return "\n".join([*lines, "", *(f"{name}: {fact}." for name, fact in facts.items()), *wrong])


def _row(report: dict[str, Any]) -> list[str]:
    again, over = report["recomputed_tokens"], report["full_recompute_tokens"]
    counts = [
        report["requests"], report["answers"], report["tokens"], sum(report["faults"].values()), report["lost"],
        report["mismatches"], len(report["leaks"]), len(report["failures"]), sum(report["refused"].values()),
        report["left_by_client"], report["retried"],
    ]  # fmt: skip
    share = f"{again / over:.0%}" if over else "-"
    growth = report["growth"]
    return [
        f"{report['seed']}", f"{report['minutes']:g}", *(f"{count:,}" for count in counts), f"{again:,}", share,
        f"{report['longest_pause_s']:.1f} s", f"{report['greatest_logprob_error']:.1e}",
        f"{growth['memory']:.1f} MiB", f"{growth['files']:g}",
    ]  # fmt: skip


def _failures(report: dict[str, Any]) -> list[str]:
    seed = f"seed {report['seed']}"
    return [f"{seed}: {sentence}" for sentence in [*report["leaks"], *report["failures"]]]


def _pool(report: dict[str, Any]) -> str:
    cluster = report["cluster"]
    cache = cluster["kv_cache"]
    instances = f"{cluster['instances']} instances of {cache['num_rblocks']} rBlocks of {cache['rblock_size']} tokens"
    lenders = f", lenders: {cluster['lenders']} of {cluster['lender_rblocks']} rBlocks" if cluster["lenders"] else ""
    kept = ", K and V in int8" if cache["dtype"] == "int8" else ""
    return f"{instances}{lenders}{kept}, 2 gateways, {report['clients']} clients"


if __name__ == "__main__":
    print(as_markdown([json.loads(Path(name).read_text()) for name in sys.argv[1:]]))
