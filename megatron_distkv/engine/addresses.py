"""Where an instance listens: unix sockets in its run directory."""

from pathlib import Path

RANK = "{rank}"


def rank_address(run_dir: Path, instance_id: str, rank: int | str = RANK) -> str:
    """The transport address of a rank; with the placeholder `{rank}`, as the ledger carries it."""
    return f"unix:{run_dir}/{instance_id}.{rank}.sock"


def control_address(run_dir: Path, instance_id: str, rank: int) -> str:
    """Where a follower takes its leader's orders."""
    return f"unix:{run_dir}/{instance_id}.{rank}.control.sock"


def request_socket(run_dir: Path, instance_id: str) -> Path:
    """Where the gateway sends requests."""
    return run_dir / f"{instance_id}.requests.sock"
