"""``genfast verify``: every op, on every backend that this machine can use, against the float64 reference.

Each op that declares ``samples`` is run forward and backward over fresh random inputs; a newly declared op is in the
table without being listed here. With odd shapes, samples are also run strided, in channels_last, with one and with no
element in the batch, and with prime batches and widths.

On a GPU the rows are made in child processes: a kernel that reads where it must not spoils the process that it ran in,
and one that never ends has to be ended. Such a row has failed, and the others are made by the next child.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._registry import OPS, Op, Sample, _tensors

# Relative errors ||out - reference|| / ||reference|| allowed: forward, gradients.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (1e-2, 2e-2),  # the gradients are rounded once more than the outputs
    torch.float16: (2e-3, 4e-3),
}
DTYPES = {str(d).removeprefix("torch."): d for d in TOLERANCES}
# Inputs are random, and some so conditioned that no arithmetic of the dtype keeps to the above (the knots of a spline,
# exp of a long sum). There a kernel may lose this many times what plain PyTorch loses; where that loses all, the call
# tells nothing. The table counts both kinds.
CONDITIONED = 16
HOPELESS = 0.1

PATIENCE = 240.0  # seconds that a child may take for a row, its kernels' compiles included
CHILD = [sys.executable, "-c", "from genfast import _verify; _verify.answer()"]


@dataclass(frozen=True)
class Task:
    """A row to be made."""

    op: str
    device: str
    backend: str
    dtype: str


@dataclass(frozen=True)
class Row:
    """One op on one backend in one dtype: the worst relative errors over its samples, or why there are none."""

    op: str
    device: str
    backend: str
    dtype: str
    forward: float = float("inf")
    backward: float = float("inf")
    excess: float = float("inf")  # the worst error over what is allowed
    worst: str = ""
    samples: int = 0
    conditioned: int = 0  # calls beyond the tolerance, held to plain PyTorch's loss on the same inputs
    untold: int = 0  # calls beyond the tolerance on which plain PyTorch loses all
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and self.excess <= 1

    @property
    def remark(self) -> str:
        """What the row's verdict does not rest on the tolerance alone for."""
        said = [f"{self.conditioned} of {self.samples} calls held to plain PyTorch's loss"] if self.conditioned else []
        said += [f"{self.untold} of {self.samples} tell nothing"] if self.untold else []
        return f" ({', '.join(said)})" if said else ""


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """float32 products and convolutions on a GPU in float32, where PyTorch takes TF32 for convolutions of itself."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _strided(a: Tensor) -> Tensor:
    """Its values as a slice of a larger tensor, which no kernel may read as if it were dense."""
    big = torch.full([2 * size + 1 for size in a.shape], 99, dtype=a.dtype, device=a.device)
    return big[tuple(slice(1, None, 2) for _ in a.shape)].copy_(a)


def _channels_last(a: Tensor) -> Tensor:
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(a.dim())
    return a if form is None else a.contiguous(memory_format=form)


LAYOUTS = {"dense": lambda a: a, "strided": _strided, "channels_last": _channels_last}


def _taken(sample: Sample, axis: int, size: int, of: Sequence[int]) -> Sample:
    """The sample with ``size`` elements along an axis of the arguments ``of``: left out or repeated.

    What is floating is drawn anew from its values, a little towards zero: ties have no one gradient, and a probability
    must remain one.
    """
    args = list(sample.args)
    for i in of:
        taken = args[i].index_select(axis, torch.arange(size) % args[i].shape[axis])
        if taken.is_floating_point() and taken.numel():
            values = args[i].flatten()[torch.randint(args[i].numel(), taken.shape)]
            taken = values * (1 - 0.3 * torch.rand(taken.shape, dtype=values.dtype))
        args[i] = taken
    return Sample(sample.label, tuple(args), sample.constant)


def _accepted(op: Op, sample: Sample) -> bool:
    try:
        op.checked_reference(*sample.args)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return False
    return True


def odd(op: Op, samples: Sequence[Sample]) -> Iterator[tuple[Sample, str]]:
    """(sample, layout) of the samples' odd variants: of each kind those of two samples, so that every kind meets every
    op.

    A batch, or an image's width, is resized in the arguments that share it, or in the first alone, whichever the op
    accepts.
    """

    leads = next(i for i in op.tensor_positions if op.kinds[i] != "t")  # whose first axis is the batch

    def resized(sample: Sample, axis: int, size: int) -> Sample | None:
        first = sample.args[leads]
        if not isinstance(first, Tensor) or first.dim() < (1 if axis == 0 else 4) or not first.shape[axis]:
            return None
        alike = [
            i
            for i, a in enumerate(sample.args)
            if isinstance(a, Tensor)
            and a.dim() >= first.dim() - (axis == 0)
            and a.dim() > 0
            and (a.shape[0] == first.shape[0] if axis == 0 else a.shape[2:] == first.shape[2:])
        ]
        for of in (alike, [i for i in alike if sample.args[i].dim() == first.dim()], [leads]):
            made = _taken(sample, axis, size, of)
            if _accepted(op, made):
                return made
        return None

    for layout in ("strided", "channels_last"):
        able = [s for s in samples if layout == "strided" or any(a.dim() in (4, 5) for a in _tensors(s.args))]
        for i in sorted({0, len(able) // 2}) if able else ():
            yield Sample(f"{able[i].label}, {layout}", able[i].args, able[i].constant), layout
    for kind, axis, size in (
        ("batch of 1", 0, 1),
        ("empty batch", 0, 0),
        ("batch of 37", 0, 37),
        ("width of 131", -1, 131),
    ):
        found = ((sample.label, resized(sample, axis, size)) for sample in samples)
        for label, made in itertools.islice(((at, m) for at, m in found if m is not None), 2):
            yield Sample(f"{label}, {kind}", made.args, made.constant), "dense"


def _prepared(
    sample: Sample, dtype: torch.dtype, device: str, rounded: torch.dtype | None = None, layout: str = "dense"
) -> list[Any]:
    """The sample's arguments as fresh leaves; ``rounded`` first rounds the values to that dtype."""

    def prepared(a: Any, differentiated: bool) -> Any:
        if isinstance(a, list):
            return [prepared(element, differentiated) for element in a]
        if not isinstance(a, Tensor):
            return a
        if not a.is_floating_point():
            return LAYOUTS[layout](a.to(device))
        value = a if rounded is None else a.to(rounded)
        return LAYOUTS[layout](value.to(device=device, dtype=dtype, copy=True)).requires_grad_(differentiated)

    return [prepared(a, i not in sample.constant) for i, a in enumerate(sample.args)]


def _outputs(result: Any) -> list[Tensor]:
    """The floating outputs; bits and levels have tests of their own."""
    return [t for t in ([result] if isinstance(result, Tensor) else result) if t.is_floating_point()]


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    """||found - expected|| / ||expected||; infinite where one is not finite and the other is."""
    if expected is None or not expected.numel():
        return 0.0
    if found is None:
        return float(expected.detach().norm())
    expected = expected.detach().double()
    found = found.detach().to(device=expected.device, dtype=torch.float64)
    if found.shape != expected.shape or not bool(found.isfinite().eq(expected.isfinite()).all()):
        return float("inf")
    error, norm = float((found - expected).norm()), float(expected.norm())
    return error / norm if norm else error


def errors(
    op: Op, sample: Sample, dtype: torch.dtype, device: str, backend: str, layout: str = "dense"
) -> tuple[float, float]:
    """The relative errors of outputs and of gradients for one call, on weights drawn for the outputs."""
    args, exact = (
        _prepared(sample, dtype, device, layout=layout),
        _prepared(sample, torch.float64, "cpu", rounded=dtype),
    )
    expected = _outputs(op.reference(*exact))
    with _backend.backend(backend):
        found = _outputs(op(*args))
        forward = max(relative_error(f, e) for f, e in zip(found, expected))
        weights = [torch.randn_like(e) for e in expected]
        leaves, exact_leaves = ([a for a in _tensors(s) if a.requires_grad] for s in (args, exact))
        live = [i for i, e in enumerate(expected) if e.requires_grad]
        if not live:
            return forward, 0.0
        cotangents = [weights[i].to(found[i].dtype) for i in live]
        grads = torch.autograd.grad(
            [found[i] for i in live], leaves, [c.to(device) for c in cotangents], allow_unused=True
        )
    exact_grads = torch.autograd.grad(
        [expected[i] for i in live], exact_leaves, [c.double() for c in cotangents], allow_unused=True
    )
    return forward, max(relative_error(g, e) for g, e in zip(grads, exact_grads))


def tasks(ops: Sequence[str] | None, device: str | None, dtype: str | None) -> list[Task]:
    """The rows of the table, in order: what each op's backends can serve."""
    devices = [device] if device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for name in ops or list(OPS):
        op = OPS[name]
        if op.samples is None:
            continue
        for where in devices:
            for backend in _backend.BACKENDS:
                if not op.refusal(backend, where):
                    kinds = [k for k, d in DTYPES.items() if d in op.dtypes[backend] and dtype in (None, k)]
                    found += [Task(name, where, backend, kind) for kind in kinds]
    return found


def excess(found: tuple[float, float], op: Op, call: tuple[Sample, str], dtype: torch.dtype) -> tuple[float, str]:
    """The larger error over what is allowed, and what it was held to: "" (the tolerance), "conditioned" or "untold"."""
    allowed = TOLERANCES[dtype]
    worst = max(f / a for f, a in zip(found, allowed))
    if worst <= 1:
        return worst, ""
    plain = errors(op, call[0], dtype, "cpu", "reference")
    if max(plain) >= HOPELESS and max(found) < float("inf"):
        return 0.0, "untold"
    beside = max(f / max(a, CONDITIONED * p) for f, a, p in zip(found, allowed, plain))
    return beside, "conditioned" if beside < worst else ""


def row(task: Task, seed: int, odd_shapes: bool) -> Row:
    """The worst of the op's samples; an exception in one is the row's error, and ends it."""
    torch.manual_seed(seed)
    op, dtype = OPS[task.op], DTYPES[task.dtype]
    assert op.samples is not None
    worst, label, count, forward, backward, beyond = "", "", 0, 0.0, 0.0, 0.0
    kinds = {"": 0, "conditioned": 0, "untold": 0}
    try:
        samples = list(op.samples(torch.Generator().manual_seed(seed)))
        for call in [(sample, "dense") for sample in samples] + (list(odd(op, samples)) if odd_shapes else []):
            label = call[0].label
            with exact_products():
                found = errors(op, call[0], dtype, task.device, task.backend, call[1])
                over, kind = excess(found, op, call, dtype)
            count += 1
            kinds[kind] += 1
            if over > beyond or not worst:
                worst = label
            forward, backward, beyond = max(forward, found[0]), max(backward, found[1]), max(beyond, over)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return Row(**asdict(task), worst=label, samples=count, error=said[:300])
    nothing = "plain PyTorch loses all on every call" if count and kinds["untold"] == count else ""
    return Row(
        **asdict(task),
        forward=forward,
        backward=backward,
        excess=beyond,
        worst=worst,
        samples=count,
        conditioned=kinds["conditioned"],
        untold=kinds["untold"],
        error=nothing,
    )


def spoilt(device: str) -> bool:
    """Whether the process can use the GPU no more: an illegal address, say, which every later call reports again."""
    if device != "cuda" or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def answer() -> None:
    """A child's work: a task a line in, a row a line out. It ends when its GPU is spoilt."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    for line in sys.stdin:
        asked = json.loads(line)
        torch.set_num_threads(asked["threads"])
        made = row(Task(**asked["task"]), asked["seed"], asked["odd"])
        print(json.dumps(asdict(made)), file=out, flush=True)
        if made.error and spoilt(made.device):
            return


class _Children:
    """One child of a thread at a time, started when there is a task and none lives."""

    def __init__(self, seed: int, odd_shapes: bool, threads: int):
        self.asked = {"seed": seed, "odd": odd_shapes, "threads": threads}
        self.child: subprocess.Popen[str] | None = None
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def __call__(self, task: Task, seconds: float) -> Row:
        if self.child is None:
            self.said.seek(0)
            self.said.truncate()
            self.child = subprocess.Popen(
                CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True
            )
        child, late = self.child, threading.Event()
        assert child.stdin is not None
        assert child.stdout is not None

        def end() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            child.stdin.write(json.dumps(self.asked | {"task": asdict(task)}) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            made = Row(**json.loads(line))
            if made.error:  # the next task gets a process that nothing has spoilt
                self.close()
            return made
        self.close()
        self.said.seek(0)
        last = self.said.read().strip().splitlines()[-1:]
        why = f"no answer in {seconds:.0f} s" if late.is_set() else f"the process ended with {child.returncode}"
        return Row(**asdict(task), error=": ".join([why, *last])[:300])

    def close(self) -> None:
        if self.child is not None:
            try:
                self.child.communicate(timeout=20)  # its input ends, and so does it
            except (subprocess.TimeoutExpired, BrokenPipeError):
                self.child.kill()
                self.child.wait()
            self.child = None


def in_children(wanted: Sequence[Task], seed: int, odd_shapes: bool, jobs: int, deadline: float) -> Iterator[Row]:
    """The rows as they are made, ``jobs`` at a time; none is begun after the deadline (of time.monotonic)."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    made: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
    for task in wanted:
        waiting.put(task)

    def work() -> None:
        ask = _Children(seed, odd_shapes, max(1, (os.cpu_count() or 1) // jobs))
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                task = waiting.get_nowait()
                made.put(ask(task, min(PATIENCE, left + 5)))
        except queue.Empty:
            pass
        finally:
            ask.close()
            made.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(wanted)))]
    for thread in threads:
        thread.start()
    ended = 0
    while ended < len(threads):
        found = made.get()
        if found is None:
            ended += 1
        else:
            yield found


def run(
    ops: Sequence[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    *,
    odd_shapes: bool | None = None,
    jobs: int | None = None,
    minutes: float | None = None,
    json_path: Path | None = None,
) -> int:
    """Prints the table and a verdict; returns the exit status, 0 when every row passed.

    Args:
        ops: names of ops; all that declare samples without.
        device: "cpu" or "cuda"; all that are there without.
        dtype: "float64", "float32", "bfloat16" or "float16"; all without.
        seed: of the random inputs; drawn and printed without, so that a failure can be repeated.
        odd_shapes: whether to take odd shapes and layouts too; on a GPU if not given.
        jobs: child processes that make the rows; without, as many as there are cores for a GPU, and none for the CPU.
        minutes: no row is begun later than that; what is left out is named, and is a failure.
        json_path: also writes the rows there, after each one, whole or not at all.

    Raises:
        ValueError: an unknown op, device or dtype, a device that is not there, or a number that is not positive.
    """
    from ._files import write_text

    known = [name for name, op in OPS.items() if op.samples is not None]
    for name in ops or ():
        if name not in known:
            raise ValueError(f"verify: op={name!r}, expected one of {', '.join(known)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"verify: dtype={dtype!r}, expected one of {', '.join(DTYPES)}")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"verify: device={device!r}, expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("verify: device='cuda', but no CUDA GPU is visible to PyTorch")
    for argument, value in (("jobs", jobs), ("minutes", minutes)):
        if value is not None and value <= 0:
            raise ValueError(f"verify: {argument}={value}, expected more than 0")
    seed = secrets.randbits(31) if seed is None else seed
    wanted = tasks(ops, device, dtype)
    deadline = time.monotonic() + (float("inf") if minutes is None else 60 * minutes)

    def rows() -> Iterator[Row]:
        for where in dict.fromkeys(task.device for task in wanted):
            # Kernels before the reference, whose rows are those to spare where time is short.
            some = sorted(
                (task for task in wanted if task.device == where), key=lambda task: task.backend == "reference"
            )
            odd_here = where == "cuda" if odd_shapes is None else odd_shapes
            if jobs is None and where == "cpu":
                for task in some:
                    if time.monotonic() < deadline:
                        yield row(task, seed, odd_here)
            else:
                yield from in_children(some, seed, odd_here, jobs or min(16, os.cpu_count() or 1), deadline)

    print(f"relative errors against the float64 reference, seed {seed}")
    print(
        f"{'op':<18} {'device':<6} {'backend':<9} {'dtype':<8} {'forward':>8} {'backward':>8}  {'verdict':<7} worst "
        "sample"
    )
    found: list[Row] = []
    results: dict[str, Any] = {"seed": seed, "rows": [], "left_out": []}
    for made in rows():
        found.append(made)
        results["rows"].append(asdict(made) | {"passed": made.passed})
        print(
            f"{made.op:<18} {made.device:<6} {made.backend:<9} {made.dtype:<8} {made.forward:8.1e} "
            f"{made.backward:8.1e}  {'pass' if made.passed else 'FAIL':<7} "
            f"{made.worst}{made.error and f': {made.error}'}{made.remark}",
            flush=True,
        )
        if json_path is not None:
            write_text(json_path, json.dumps(results, indent=1) + "\n")
    done = {(r.op, r.device, r.backend, r.dtype) for r in found}
    left = [task for task in wanted if tuple(asdict(task).values()) not in done]
    if json_path is not None:
        text = json.dumps(results | {"left_out": [asdict(task) for task in left]}, indent=1)
        write_text(json_path, text + "\n")
    if not wanted:
        print("nothing was verified: no backend serves what was asked for")
        return 1
    for task in left:
        print(
            f"{task.op:<18} {task.device:<6} {task.backend:<9} {task.dtype:<8} left out: the {minutes} minutes were "
            "over"
        )
    failed = sum(not r.passed for r in found)
    if failed or left:
        print(f"{len(found) - failed} of {len(wanted)} passed")
    else:
        print(f"all {len(found)} passed")
    return 1 if failed or left else 0
