"""Finds the files that come with the package, ``configs/`` and the packaged rows, wherever it is installed."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def packaged(path: str | Path) -> Path:
    """`path`, with a home for its `~`, or the file or folder of that name that came with the package if there is none.

    Only names below ``configs/`` and ``zolightning/`` are looked for. In a wheel both are inside the package; in a
    checkout, ``configs/`` is beside it.
    """
    path = Path(path).expanduser()
    if path.exists() or path.parts[:1] not in (("configs",), ("zolightning",)):
        return path
    candidates = (_PACKAGE / path, _PACKAGE.parent / path)
    return next((candidate for candidate in candidates if candidate.exists()), path)


def configs() -> Path:
    """The folder ``configs`` that came with the package."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"
