"""``python -m zolightning`` is the command ``zolightning``."""

from zolightning.cli import main

if __name__ == "__main__":
    main()
