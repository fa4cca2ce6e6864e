"""Which families there are. A family's file registers it; nobody outside of this folder names one."""

from megatron_distkv.config.model import ModelConfig
from megatron_distkv.errors import ConfigError
from megatron_distkv.model.families.family import Family, options_of

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Raises ValueError when another family has its name or its architecture."""
    taken = family_of_architecture(family.architecture) or _FAMILIES.get(family.name)
    if taken is not None:
        raise ValueError(f"{family.name} ({family.architecture}): {taken.name} ({taken.architecture}) is registered")
    _FAMILIES[family.name] = family


def family_of(model: ModelConfig) -> Family:
    """The one that the model names, or that its fields tell.

    Raises ConfigError for an unknown name, which lists the known ones; for one whose layers are not those of the other
    fields; and for options that the family does not have.
    """
    if model.family is None:
        [family] = (x for x in _FAMILIES.values() if x.matches is not None and x.matches(model))
    else:
        family = family_named(model.family, "model.family")
        if family.matches is not None and not family.matches(model):
            told = family_of(model.model_copy(update={"family": None})).name
            raise ConfigError(f"model.family is {family.name!r}, but the model's other keys are those of {told!r}")
    options_of(model, family.options)
    return family


def family_named(name: str, where: str) -> Family:
    """Raises ConfigError, which lists the known ones, with `where` in front."""
    if name not in _FAMILIES:
        raise ConfigError(f"{where}: the family {name!r} is not known; known: {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[name]


def family_of_architecture(architecture: str) -> Family | None:
    """By the class in config.json; None: not known."""
    return next((x for x in _FAMILIES.values() if x.architecture == architecture), None)


def known_architectures() -> list[str]:
    return sorted(family.architecture for family in _FAMILIES.values())
