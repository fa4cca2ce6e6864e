"""What a member has measured of its ways to others, as its registration's info carries it."""

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

# In a registration's `info`: JSON, `{creditor: [round trip us, MB/s, us to ask, us home]}`.
WAYS = "ways"


class WayCost(NamedTuple):
    """Of one debtor and one creditor, measured once.

    `ask_us`: the questions of one decode step to it, of all layers, on their way there and back. `home_us`: one rBlock
    on its way home. (paper: pulling home beats asking remotely where more decode steps remain than the break-even.)
    """

    round_trip_us: float
    megabytes_per_s: float
    ask_us: float
    home_us: float

    @property
    def break_even_steps(self) -> float:
        """Decode steps after which one rBlock, all that a request has there, had better come home at once."""
        return self.home_us / self.ask_us


def write_ways(ways: Mapping[str, WayCost]) -> str:
    return json.dumps({name: [round(figure, 3) for figure in way] for name, way in ways.items()})


def read_ways(said: str) -> dict[str, WayCost]:
    """Another process wrote it: what cannot be read is left out."""
    try:
        values = json.loads(said)
    except (ValueError, RecursionError):
        return {}
    pairs = values.items() if isinstance(values, dict) else ()
    return {name: WayCost(*figures) for name, figures in pairs if _are_figures(figures)}


def _are_figures(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) == len(WayCost._fields)
        and all(type(value) in (int, float) and math.isfinite(value) and value > 0 for value in values)
    )
