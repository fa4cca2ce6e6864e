"""What a GPU check found so far, on disk after everything that it learns: stopping it early loses nothing."""

import json
import os
from pathlib import Path
from typing import Any

HEAD = (
    "| work | measured | limit | share | ms | spread | peers (times as fast as) |",
    "|---|---|---|---|---|---|---|",
)


class Report:
    def __init__(self, out: Path, machine: str) -> None:
        self.out, self.machine = out, machine
        self.figures: list[dict[str, Any]] = []
        self.conformance: dict[str, str] = {}
        self.faults: list[str] = []
        self.not_run: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        self.save()

    def add_figure(self, figure: dict[str, Any]) -> None:
        self.figures.append(figure)
        self.save()
        print(row(figure), flush=True)

    def add_conformance(self, backend: str, verdict: str) -> None:
        self.conformance[backend] = verdict
        self.save()
        print(f"conformance of {backend}: {verdict}", flush=True)

    def add_fault(self, what: str) -> None:
        self.faults.append(what)
        self.save()
        print(f"FAILED: {what}", flush=True)

    def add_not_run(self, what: str) -> None:
        self.not_run.append(what)
        self.save()
        print(f"not run: {what}", flush=True)

    def save(self) -> None:
        """Whole files, or those of before."""
        found = {name: value for name, value in vars(self).items() if name != "out"}
        self._replace("gpu_check.json", json.dumps(found, indent=1) + "\n")
        self._replace("gpu_check.md", self._markdown())

    def _replace(self, name: str, text: str) -> None:
        unfinished = self.out / f"{name}.part"
        unfinished.write_text(text)
        os.replace(unfinished, self.out / name)

    def _markdown(self) -> str:
        head = f"# Kernels on a GPU\n\n{self.machine}. bf16, 8 KV heads, group 4, head dim 128, rBlocks of 64, seed 0; "
        lines = [head + "medians, L2 flushed.\n", *HEAD, *map(row, self.figures), ""]
        lines += [f"- Conformance of {backend}: {verdict}." for backend, verdict in self.conformance.items()]
        lines += [f"- FAILED: {fault}." for fault in self.faults]
        lines += [f"- Not run: {what}." for what in self.not_run]
        left_out = {(peer, why) for figure in self.figures for peer, why in figure["left_out"].items()}
        lines += [f"- Left out: {peer} ({why})." for peer, why in sorted(left_out)]
        return "\n".join(lines) + "\n"


def row(figure: dict[str, Any]) -> str:
    peers = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in figure["peers"].items()) or "-"
    measured, limit = (f"{figure[key]:.1f} {figure['unit']}" for key in ("value", "ceiling"))
    told = f"| {figure['work']} | {measured} | {limit} | {figure['share']:.2f} | {figure['milliseconds']:.3f} "
    return told + f"| {figure['spread']:.0%} | {peers} |"
