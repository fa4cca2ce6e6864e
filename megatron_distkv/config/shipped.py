"""The configurations that come with the package: configs/ in a checkout, beside the modules in a wheel."""

from pathlib import Path

_ROOM = Path(__file__).parents[1]
_IN_CHECKOUT = _ROOM.parent / "configs"
SHIPPED = _ROOM / "configs" if (_ROOM / "configs").is_dir() else _IN_CHECKOUT


def find_config(path: Path) -> Path:
    """`path`, or, where no such file is, the shipped one of that name: `configs/train/passkey.yaml` works anywhere."""
    if not path.exists() and path.parts[:1] == ("configs",):
        shipped = SHIPPED.joinpath(*path.parts[1:])
        if shipped.is_file():
            return shipped
    return path
