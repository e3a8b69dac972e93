"""Versions of installed packages."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """The version of a package, or None if it is not installed, or runs from a folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
