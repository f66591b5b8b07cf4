"""Small calls of every GPU kernel, for compute-sanitizer to watch: ``compute-sanitizer python -m tests.gpu.sanitize``.

Says which call comes next, so that a finding between two lines belongs to the first; ``--list`` needs no GPU. A call's
numbers
are not looked at: ``genfast verify`` and the tests do that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator

import torch

from genfast import _verify
from genfast._registry import OPS, Op, Sample

BEGUN = "sanitize:"
BACKENDS = ("triton", "cuda")


def _call(op: Op, sample: Sample, backend: str, layout: str) -> Callable[[], object]:
    return lambda: _verify.errors(op, sample, torch.float32, "cuda", backend, layout)


def _mixture() -> object:
    import genfast

    params = torch.randn(2, 30, 3, 5, device="cuda")
    return genfast.ops.discretized_logistic_mixture_sample(params, torch.rand(2, 4, 3, 5, device="cuda"))


def _nade() -> object:
    import genfast

    w, v, b, c = (torch.randn(s, device="cuda") for s in ((7, 13), (7, 13), (7,), (13,)))
    return genfast.ops.nade_sample(torch.rand(3, 7, 1, device="cuda"), w, v, b, c)


def _sampler(label: str) -> Callable[[], object]:
    def sample() -> object:
        from genfast.sampling import Sampler
        from tests.kernels.test_pixel_program_cuda import CASES

        build, levels, head, shape, condition = CASES[label]
        network = build().eval().to("cuda")
        context = None if condition is None else torch.randn(3, *condition, device="cuda")
        return Sampler(network, levels=levels, head=head).sample(3, shape, context=context)

    return sample


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call): of each op and backend the first, middle and last sample, and an odd variant in which none is
    dense."""
    for op in OPS.values():
        if op.samples is None:
            continue
        samples = list(op.samples(torch.Generator().manual_seed(0)))
        chosen = [(samples[i], "dense") for i in sorted({0, len(samples) // 2, len(samples) - 1})]
        for backend in (b for b in BACKENDS if b in op.kernels):
            for sample, layout in [*chosen, (samples[0], "strided")]:
                yield f"{op.name}, {backend}, {sample.label}, {layout}", _call(op, sample, backend, layout)
    yield "discretized_logistic_mixture_sample, triton, colours, dense", _mixture
    yield "nade_sample, triton, bernoulli, dense", _nade
    for label in ("one colour", "class", "mixture", "sequence"):
        yield f"pixel_program, cuda, {label}, dense", _sampler(label)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitize", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="every Nth call from the Ith on (default 0/1: all)"
    )
    parser.add_argument("--skip", type=int, default=0, metavar="K", help="leave out that many of them at the beginning")
    arguments = parser.parse_args()
    i, n = map(int, arguments.part.split("/"))
    chosen = list(calls())[i::n][arguments.skip :]
    if arguments.list:
        print("\n".join(name for name, _ in chosen))
        return 0
    if not torch.cuda.is_available():
        print("sanitize: no CUDA GPU is visible to PyTorch", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    for name, call in chosen:
        print(BEGUN, name, flush=True)
        error = ""
        try:
            torch.manual_seed(0)
            call()
            torch.cuda.synchronize()
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        print(BEGUN, "raised" if error else "done", error, flush=True)
        if error and _verify.spoilt("cuda"):
            os._exit(3)  # the calls that follow need a process of their own; a spoilt one has nothing to tidy
    return 0


if __name__ == "__main__":
    sys.exit(main())
