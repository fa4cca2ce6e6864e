"""Amounts of memory as a person writes them."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def parse_memory_size(value: Any) -> Any:
    """`64GiB`, `1.5 GB`, `4096`: bytes. Raises ValueError for anything else that is not a number."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError("an amount of memory looks like 64GiB, 500MB or 4096")
    return int(float(found[1]) * _UNITS[found[2].lower()])


MemorySize = Annotated[int, BeforeValidator(parse_memory_size), Field(ge=1)]
