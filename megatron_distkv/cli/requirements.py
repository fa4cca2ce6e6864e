"""Which of this package's requirements are installed, by their metadata alone: nothing is imported."""

from importlib import metadata

_PACKAGE = "megatron-distkv"


def version_of(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unmet_requirements() -> dict[str, str]:
    """What is missing or too old, by name, each with one sentence. Empty: all is well."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # comes with megatron-core and deepspeed
        return {"packaging": "packaging is not here: pip install packaging"}
    try:
        requirements = [Requirement(line) for line in metadata.requires(_PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return {_PACKAGE: f"{_PACKAGE} is not installed: pip install -e . in its folder"}
    unmet = {}
    for wanted in requirements:
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = version_of(wanted.name)
        if found is None:
            unmet[wanted.name] = f"pip install '{wanted.name}{wanted.specifier}'"
        elif not wanted.specifier.contains(found, prereleases=True):
            unmet[wanted.name] = f"{wanted.name} {found} is here, {wanted.specifier} is needed"
    return unmet
