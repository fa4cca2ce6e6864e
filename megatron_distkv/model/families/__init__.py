"""Families of models, one file each: all that is special about it (family.py says what that can be).

A new family is its file here. It is found by itself.
"""

from importlib import import_module
from pkgutil import iter_modules

from megatron_distkv.model.families.family import Family, Parts, TensorNames, options_of
from megatron_distkv.model.families.registry import (
    family_named,
    family_of,
    family_of_architecture,
    known_architectures,
    register,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")  # a family's file registers it

__all__ = [
    "Family",
    "Parts",
    "TensorNames",
    "family_named",
    "family_of",
    "family_of_architecture",
    "known_architectures",
    "options_of",
    "register",
]
