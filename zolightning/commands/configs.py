"""``zolightning configs``: lists the config files that come with the package, and copies them."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from zolightning.checkpoints.checkpoint_io import require_writable
from zolightning.packaged import configs


def main(arguments: Sequence[str]) -> None:
    """Runs the command on its arguments.

    Raises:
        ValueError: if the folder to copy to exists, or cannot be made.
    """
    parser = argparse.ArgumentParser(
        prog="zolightning configs",
        description="Lists the config files that come with the package. `--config configs/...` finds them from every "
        "folder; a file of that name below the working directory takes precedence.",
    )
    parser.add_argument("--copy", metavar="FOLDER", help="copy them into a new folder, to edit them there")
    copy: str | None = parser.parse_args(arguments).copy
    folder = configs()
    if copy is None:
        for path in sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            print(f"{'configs' / path.relative_to(folder)!s:48} {first.removeprefix('# ')}")
        return
    target = Path(copy)
    if target.exists():
        raise ValueError(f"`--copy` is {copy}, which exists. Name a folder that does not.")
    require_writable("--copy", target)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"copied to {target}")
