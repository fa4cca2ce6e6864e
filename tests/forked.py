"""Processes that are forked from one that has imported everything: importing is what costs time."""

import os
import traceback
from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """Pid of a child that does this and no more: it ends with 0, or with 1 and a traceback where `work` raises."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # Python's own name; what its parent would tidy up at its end is not a forked child's


def import_compiler() -> None:
    """What the first optimizer of a process makes torch import: before forking, so that it happens once."""
    import torch

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
