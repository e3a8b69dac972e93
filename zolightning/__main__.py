"""``python -m zolightning`` is the command ``zolightning``."""

from zolightning.cli import console

if __name__ == "__main__":
    console()
