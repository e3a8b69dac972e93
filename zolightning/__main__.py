"""The command ``zolightning``, also as ``python -m zolightning``: runs it, and reports wrong input in one line."""

import os
import re
import signal
import sys
import traceback
from pathlib import Path
from pickle import UnpicklingError

from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import DistNetworkError

from zolightning.cli import ZerothOrderCLI
from zolightning.commands import configs, report
from zolightning.commands.quiet import hush
from zolightning.cublas import repeat_products
from zolightning.malloc import keep_freed_memory
from zolightning.strategies.ranks import leave_at_exit, lost_rank

_INTERRUPTED = 128 + signal.SIGINT
_NO_PACKAGE = re.compile(r"class_path '[\w.]*?(\w+)':\s+((?:Requirement '|No module named '|Install \w+ to ).*)")
_OF_SETTINGS = (  # how errors of Lightning's begin that are about a setting, and have classes of any errors
    " `val_check_interval` (",
    "Early stopping conditioned on metric",
    "When using the learning rate finder",
)


def main(args: ArgsType = None) -> None:
    """Runs the command line; `args` stands in for ``sys.argv[1:]``.

    Raises:
        SystemExit: with one line, for input that cannot work; with 130 after Ctrl-C.
    """
    hush()
    try:
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list) and words[:1] == ["configs"]:
            configs.main(words[1:])
        elif isinstance(words, list) and words[:1] == ["report"]:
            report.main(words[1:])
        else:
            ZerothOrderCLI(args)
    except KeyboardInterrupt:
        print("Stopped by SIGINT.", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's in a validation, with a message of its own
            raise SystemExit(_INTERRUPTED) from None
        raise
    except Exception as error:
        if (advice := _advice(error)) is None:
            raise
        raise SystemExit(f"error: {advice}") from error


def console() -> None:
    """The command ``zolightning``: :func:`main`, whose output may go to a pipe that is closed early (``| head``).

    What a config names by its import path may be a file in the working directory, as for ``python -m zolightning``.
    """
    if sys.platform == "win32":
        raise SystemExit("error: the commands need Linux or macOS; on Windows, use its WSL.")
    keep_freed_memory()
    repeat_products()
    leave_at_exit()  # under Lightning's own strategies too
    sys.path.append(os.getcwd())  # where a user's own classes and functions are, last: it hides no package
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        raise SystemExit(1) from None


def _advice(error: BaseException) -> str | None:
    """What to tell the user instead of a traceback, or None for anything that may be a bug.

    That is the message of a `raise` statement in this package, and of Lightning's exception for wrong settings; of a
    collective, that a rank is gone.
    jsonargparse wraps what a constructor raises into its own account of the types it tried.
    """
    package = Path(__file__).parent
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MisconfigurationException):
            return str(cause)
        if "not validate against any of the Union" in str(cause) and (found := re.search(r"\n *- (`.*)", str(cause))):
            return found[1]  # by a constructor, among what is wrong with other types
        if found := _NO_PACKAGE.search(str(cause)):
            return f"{found[1]} needs a package that is not installed: {found[2]}"
        if str(cause).startswith(_OF_SETTINGS):
            return str(cause).strip()
        if isinstance(cause, UnpicklingError):
            found = re.search(r"GLOBAL:? (\S+)", str(cause))
            what = f", {found[1]}," if found else ""
            return f"`ckpt_path` holds something other than tensors and plain values{what} and was not loaded."
        if isinstance(cause, KeyError) and cause.args == ("pytorch-lightning_version",):
            return "`ckpt_path` is a file of torch's, but not a Trainer's checkpoint: it does not say what was trained."
        if isinstance(cause, DistNetworkError) and "EADDRINUSE" in str(cause):
            return f"`MASTER_PORT` is {os.environ['MASTER_PORT']}, which another program listens on: set another port."
        if isinstance(cause, KeyError) and "checkpoint contains only the model" in str(cause):
            return "`ckpt_path` holds weights only (`save_weights_only`), from which no run goes on: use 'last'."
        if (lost := lost_rank(cause)) is not None:
            return lost
        for raised in traceback.extract_tb(cause.__traceback__)[-1:]:
            if Path(raised.filename).is_relative_to(package) and (raised.line or "").startswith("raise "):
                return str(cause)
        cause = cause.__cause__
    return None


if __name__ == "__main__":
    console()
