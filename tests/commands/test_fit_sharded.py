"""``zolightning fit`` on two processes that share the weights, started as a user starts them."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from cli_runs import CONFIGS, Runs


def fit(runs: Runs, strategy: str, name: str, *options: Any) -> dict[str, Any]:
    """Trains, and returns the last checkpoint."""
    chosen = ("--config", CONFIGS / f"strategies/{strategy}.yaml", "--trainer.logger.init_args.name", name)
    arguments = runs.arguments("fit", *chosen, *options)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PL_")}
    done = subprocess.run(
        [sys.executable, "-m", "zolightning", *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    path = runs.folder / "logs" / name / "version_0/checkpoints/last.ckpt"
    return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_two_processes_share_the_weights_and_go_on_with_all_of_them(runs: Runs) -> None:
    whole = fit(runs, "zo_ddp", "whole")
    shards = fit(runs, "zo_fsdp", "shards")
    fit(runs, "zo_fsdp", "begun", "--trainer.max_steps", 3)
    last = runs.folder / "logs/begun/version_0/checkpoints/last.ckpt"
    rest = fit(runs, "zo_ddp", "rest", "--ckpt_path", last)
    assert whole["global_step"] == shards["global_step"] == rest["global_step"] == 6
    for found in (shards, rest):
        for name, tensor in whole["state_dict"].items():
            assert torch.equal(found["state_dict"][name], tensor), name
