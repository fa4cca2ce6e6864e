"""Ending a process in order: each step is tried, whatever becomes of the others."""

from collections.abc import Callable, Iterable

from megatron_distkv.log import get_logger

logger = get_logger(__name__)


def close_in_order(steps: Iterable[Callable[[], None]]) -> None:
    for step in steps:
        try:
            step()
        except Exception as error:
            logger.warning("while closing: %s", error)
