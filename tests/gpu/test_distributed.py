"""A run that torchrun starts over NCCL: one process, since NCCL wants a GPU for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
WORDS = ["-m", "genfast", "train", "glow", "--device", "cuda", "--steps", "4", "--hidden", "8", "--flow-steps", "2"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_over_nccl_is_that_of_one_process(tmp_path, strategy):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    for name, words in (("one", []), ("nccl", torchrun)):
        parallel = ["--parallel", strategy] if words else []
        command = [sys.executable, *words, *WORDS, "--out", str(tmp_path / name), *parallel]
        subprocess.run(command, check=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, nccl = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "nccl"))
    for figure in ("train_bits_per_dim", "test_bits_per_dim"):
        assert nccl[figure] == pytest.approx(one[figure], rel=1e-4)
    again = [sys.executable, *WORDS, "--out", str(tmp_path / "nccl"), "--steps", "6", "--resume"]
    subprocess.run(again, check=True, timeout=240)
    assert (tmp_path / "nccl" / "checkpoint-6").exists()
