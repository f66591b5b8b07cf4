"""What everything distributed is made of: portions, gathering, sums and seeds, on two real processes."""

from __future__ import annotations

import pytest
import torch

from genfast import distributed

from .ranks import JobError


def _basics():
    found = {"rank": distributed.rank(), "size": distributed.size(), "first": distributed.first()}
    found["portions"] = [(distributed.portion(n).start, distributed.portion(n).stop) for n in (0, 1, 5, 6)]
    found["weights"] = distributed.weight(5)
    rows = torch.arange(10).reshape(5, 2)
    found["gathered"] = [
        torch.equal(distributed.gather(rows[distributed.portion(n)].to(dtype)), rows[:n].to(dtype))
        for n, dtype in (
            (5, torch.int64),
            (1, torch.float64),
            (0, torch.float32),
            (4, torch.uint8),
            (3, torch.bool),
            (5, torch.bfloat16),
        )
    ]
    found["total"] = distributed.total(distributed.rank() + 1.5, 0.1)
    draws = []
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0), (-1, 0)):
        distributed.seed(seed, step)
        draws.append(float(torch.rand(())))
    found["draws"] = draws
    return found


def test_ranks_share_and_gather(ranks):
    a, b = ranks.run(_basics)
    assert [(x["rank"], x["size"], x["first"]) for x in (a, b)] == [(0, 2, True), (1, 2, False)]
    assert a["portions"] == [(0, 0), (0, 1), (0, 3), (0, 3)]
    assert b["portions"] == [(0, 0), (1, 1), (3, 5), (3, 6)]
    assert (a["weights"], b["weights"]) == (6 / 5, 4 / 5)
    assert all(a["gathered"] + b["gathered"])
    assert a["total"] == b["total"] == [4.0, 0.2]
    assert a["draws"][0] == a["draws"][1]
    assert len({*a["draws"], *b["draws"]}) == 8  # each of four seeds on two ranks its own


def _unknown(name):
    distributed.parallel(torch.nn.Linear(2, 2), name)


def test_an_error_on_the_ranks_is_told(ranks):
    with pytest.raises(JobError, match=r"rank 1: (.|\n)*parallel='tensor', expected one of 'ddp', 'fsdp'"):
        ranks.run(_unknown, "tensor")


def test_without_torchrun_there_is_one_rank():
    assert (distributed.rank(), distributed.size(), distributed.first(), distributed.weight(3)) == (0, 1, True, 1.0)
    t = torch.randn(3, requires_grad=True)
    assert torch.equal(distributed.gather(t), t)
    assert distributed.total(1, 2.5) == [1.0, 2.5]
    with distributed.start("cpu") as device:
        assert device == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"device='cuda:1', and .*; expected cpu"), distributed.start("cuda:1"):
        pass


@pytest.mark.parametrize(("device", "message"), [("cuda:1", "expected cpu or cuda"), ("mps", "expected cpu or cuda")])
def test_a_device_that_torchrun_cannot_give_is_refused(device, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=message), distributed.start(device):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match="finds 0 GPUs"), distributed.start("cuda"):
        pass


def test_strategies_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"parallel='tensor', expected one of 'ddp', 'fsdp'"):
        distributed.parallel(torch.nn.Linear(2, 2), "tensor")
    with pytest.raises(ValueError, match="needs a process group"):
        distributed.parallel(torch.nn.Linear(2, 2), "fsdp")
