"""Plug-in of pytest, and module to import first: a process without packages that images with CUDA seldom have."""

import importlib.metadata
import importlib.util
import sys
from typing import Any

ABSENT = {"datasets", "gguf", "jsonargparse", "pebble", "tensorboard", "torchdata"}


class _Absent:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _only_present(name: str) -> importlib.metadata.Distribution:
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return _from_name(name)


_from_name, _find_spec = importlib.metadata.Distribution.from_name, importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ABSENT else _find_spec(name, package)
importlib.metadata.Distribution.from_name = _only_present
sys.meta_path.insert(0, _Absent())
assert not ABSENT & sys.modules.keys()
