"""Runs a script's main() on many ranks: python fork_ranks.py RANKS SCRIPT ARGUMENT...

One process imports what the script needs and forks the ranks.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from megatron_distkv.launch.commands import free_port

from tests.forked import fork


def main() -> int:
    num_ranks, script = int(sys.argv[1]), Path(sys.argv[2])
    sys.argv[:] = sys.argv[2:]
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = [fork(lambda rank=rank: run(rank, module)) for rank in range(num_ranks)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return int(any(statuses))


def run(rank: int, module: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    module.main()


if __name__ == "__main__":
    sys.exit(main())
