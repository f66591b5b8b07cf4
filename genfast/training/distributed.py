"""One run on many processes: the ranks that ``torchrun`` starts take the steps of one process, up to rounding.

    torchrun --nproc-per-node=2 -m genfast train glow --data digits --batch-size 64
    torchrun --nproc-per-node=8 -m genfast train gated_pixelcnn --device cuda --parallel fsdp
    torchrun --nproc-per-node=2 -m genfast sample --checkpoint out/glow-digits -n 256

What is exact. ``batch_size`` is the whole batch, over all ranks. Every rank draws the random numbers of the whole batch
from equal generators and works on its :func:`portion`; its mean loss counts by the length of that portion
(:func:`weight`), so that gradients averaged over the ranks are those of the whole batch, in uneven parts too. Losses,
clipped gradient norms, checkpoints, held-out figures and samples are those of one process up to the order in which
floating-point numbers are added. Activation norms are set from the whole first batch.

What is not. Dropout inside networks draws other numbers on each rank (:func:`seed`), so a run repeats on the same
number of ranks and not on another. Layers and losses with statistics of a batch (torch's batch normalisation, minibatch
deviation and discrimination, relativistic averages, discrepancies) see the rank's portion. Memory pools and caches
belong to one process each.

Without torchrun there is one rank, 0, and nothing here communicates; a process group that the user's code has made
serves as well. :func:`parallel` wraps what has its loss inside its ``forward``, an :class:`Objective`:
DistributedDataParallel and FSDP2 see no other method. Under FSDP2 weights are shards between the steps; :func:`whole`
gathers them for everything else.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..nn import BatchNormFlow, FlowSequential, ReversibleSequential

STRATEGIES = ("ddp", "fsdp")
_LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # what torchrun puts into the environment


def _group() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _group() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _group() else 1


def first() -> bool:
    """Whether this is rank 0, the one that prints and writes."""
    return rank() == 0


def check_device(device: str | torch.device) -> None:
    """Raises ValueError for a device that this machine or this PyTorch does not have.

    Example:
        >>> from genfast import distributed
        >>> distributed.check_device("cpu")
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}, expected cpu or cuda") from error
    if wanted.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            why = (
                "no GPU is visible"
                if torch.version.cuda or torch.version.hip
                else f"PyTorch {torch.__version__} has no CUDA"
            )
            raise ValueError(f"device={str(device)!r}, and {why}; expected cpu")
        if (wanted.index or 0) >= count:
            raise ValueError(f"device={str(device)!r}, expected cuda:0 to cuda:{count - 1}")
    elif wanted.type != "cpu" and not (wanted.type == "mps" and torch.backends.mps.is_available()):
        raise ValueError(f"device={str(device)!r}, expected cpu or cuda")


@contextlib.contextmanager
def start(device: str = "cpu") -> Iterator[str]:
    """Joins the processes that torchrun has started, over gloo or, on GPUs, NCCL; gives the device of this one.

    Nothing but ``device`` without torchrun, or where a process group exists already.

    Args:
        device: "cpu" or "cuda"; under torchrun that is the GPU LOCAL_RANK.

    Raises:
        ValueError: a device that is not there, a numbered GPU under torchrun, or fewer GPUs than processes.

    Example:
        >>> from genfast import distributed
        >>> with distributed.start("cpu") as device:
        ...     print(device, distributed.rank(), distributed.size())
        cpu 0 1
    """
    if _group() or not all(name in os.environ for name in _LAUNCHED):
        check_device(device)
        yield device
        return
    local, kind = int(os.environ["LOCAL_RANK"]), torch.device(device).type
    if kind not in ("cpu", "cuda") or torch.device(device).index is not None:
        raise ValueError(
            f"device={device!r}, expected cpu or cuda: under torchrun each process takes the GPU of its own number"
        )
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"device='cuda', and process {local} of this machine finds {torch.cuda.device_count()} GPUs; "
                "start at most as many processes as there are GPUs"
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", device_id=torch.device(device) if kind == "cuda" else None
    )
    try:
        yield device
    except BaseException:
        if kind == "cpu":  # NCCL would wait for the others; this process ends, and torchrun then ends them
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def seed(seed: int, step: int = 0) -> None:
    """Sets torch's global generators to a state that is a function of (seed, rank, step) alone."""
    drawn = np.random.SeedSequence([seed % 2**64, rank(), step]).generate_state(1, np.uint64)
    torch.manual_seed(int(drawn[0]))


# ---- the parts of a batch ----


def portion(n: int) -> slice:
    """This rank's consecutive part of ``n`` items; the sizes differ by at most one, the larger first.

    Example:
        >>> from genfast import distributed
        >>> distributed.portion(5)  # without other ranks
        slice(0, 5, None)
    """
    share, more = divmod(n, size())
    begin = rank() * share + min(rank(), more)
    return slice(begin, begin + share + (rank() < more))


def check_batch(n: int) -> int:
    """``n``, or ValueError where some rank would have none of so many items."""
    if n < size():
        raise ValueError(
            f"train: batch_size={n} on {size()} ranks, expected at least one item for each (it is over all of them)"
        )
    return n


def weight(n: int) -> float:
    """What makes the average over the ranks of this rank's mean over its portion of ``n`` items the mean over all of
    them."""
    part = portion(n)
    return float((part.stop - part.start) * size() / n)


def _home() -> torch.device:
    """Where the process group takes tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gather(t: Tensor) -> Tensor:
    """The rows of all ranks in the order of the ranks, on every rank; parts may differ in length, and be empty. No
    gradient."""
    t = t.detach()
    if size() == 1:
        return t
    lengths = [torch.empty(1, dtype=torch.int64, device=_home()) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(t)], device=_home()))
    counts = [int(n) for n in lengths]
    mine = torch.zeros((max(counts), *t.shape[1:]), dtype=t.dtype, device=_home())
    mine[: len(t)] = t
    parts = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(parts, mine)
    return torch.cat([part[:n] for part, n in zip(parts, counts)]).to(t.device)


def total(*values: float) -> list[float]:
    """The sum of each of these numbers over the ranks, float64; the same bits on every rank."""
    if size() == 1:
        return [float(v) for v in values]
    sums = torch.tensor(values, dtype=torch.float64, device=_home())
    dist.all_reduce(sums)
    return [float(v) for v in sums]


def barrier() -> None:
    """Waits until every rank is here."""
    total(0.0)


def on_first(function: Callable[..., None], *args: Any, **options: Any) -> None:
    """Calls ``function(*args, **options)`` on rank 0, and raises its exception on every rank; all ranks call this
    together.

    An exception on one rank alone would leave the others waiting for it in their next collective call.

    Example:
        >>> from genfast import distributed
        >>> distributed.on_first(print, "once for all ranks")
        once for all ranks
    """
    error: list[BaseException | None] = [None]
    if first():
        try:
            function(*args, **options)
        except Exception as raised:
            if size() == 1:
                raise
            error = [raised]
    if size() > 1:
        dist.broadcast_object_list(error, 0, device=_home())
    if error[0] is not None:
        raise error[0]


class _ForAll(TorchFunctionMode):
    def __init__(self, n: int, generator: torch.Generator) -> None:
        super().__init__()
        self.n, self.generator, self.part = n, generator, portion(n)
        self.count = self.part.stop - self.part.start

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not self.generator:
            return func(*args, **kwargs)
        if func in (torch.rand, torch.randn):
            shape = tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else args
            if shape and shape[0] == self.count:
                return func((self.n, *shape[1:]), **kwargs)[self.part].clone()
        elif (
            func in (Tensor.uniform_, Tensor.normal_, Tensor.bernoulli_)
            and args[0].dim()
            and len(args[0]) == self.count
        ):
            into = args[0]
            func(drawn := into.new_empty((self.n, *into.shape[1:])), *args[1:], **kwargs)
            return into.copy_(drawn[self.part])
        return func(*args, **kwargs)


def drawn_for_all(n: int, generator: torch.Generator) -> contextlib.AbstractContextManager[Any]:
    """While entered, random tensors with a row for each item of this rank's portion of ``n`` are its rows of those of
    all.

    That is what torch.rand, torch.randn, uniform_, normal_ and bernoulli_ draw from ``generator``, which is in the same
    state on all ranks and stays so.

    Example:
        >>> import torch
        >>> from genfast import distributed
        >>> generator = torch.Generator()
        >>> with distributed.drawn_for_all(4, generator):
        ...     noise = torch.randn(4, 2, generator=generator)
    """
    return contextlib.nullcontext() if size() == 1 else _ForAll(n, generator)


def share(tensors: Iterable[Tensor]) -> None:
    """Makes these tensors, in place, those of rank 0; all ranks call this together."""
    if size() > 1:
        with torch.no_grad():
            for t in tensors:
                dist.broadcast(t, 0)


def average(tensors: Sequence[Tensor]) -> None:
    """Makes these tensors, in place, the average of those of all ranks, which call this together."""
    if size() > 1 and tensors:
        # one message for all of them, whose start costs more than its length
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= size()
        for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


# ---- models ----


class Objective(nn.Module):
    """A loss as a ``forward``, with its model inside: what data-parallel wrappers can hook.

    Args:
        model: whose parameters the loss trains. It stays the plain module, for whatever else is asked of it.
        loss: called with the arguments of ``forward``; returns one or more tensors.

    Example:
        >>> import torch
        >>> from genfast import distributed, models
        >>> model = models.MAF(4, hidden=8)
        >>> objective = distributed.parallel(distributed.Objective(model, lambda x: -model.log_prob(x).mean()))
        >>> objective(torch.randn(8, 4)).backward()
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.loss(*args, **kwargs)


def check_strategy(strategy: str) -> None:
    """Raises ValueError for an unknown strategy, or for "fsdp" without a process group."""
    if strategy not in STRATEGIES:
        raise ValueError(f"parallel={strategy!r}, expected one of {', '.join(map(repr, STRATEGIES))}")
    if strategy == "fsdp" and not _group():
        raise ValueError("parallel='fsdp' needs a process group: start with torchrun, or call init_process_group")


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts: elements of a model's lists and sequences, and of those within them."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential | FlowSequential):
            for element in child.children():
                # Of a reversible chain the stages of the elements are called, not the elements: it is one part.
                nested = isinstance(element, nn.ModuleList | nn.Sequential | FlowSequential)
                if nested and not isinstance(element, ReversibleSequential):
                    yield from _blocks(nn.ModuleList([element]))
                elif any(True for _ in element.parameters()):
                    yield element


def parallel(module: nn.Module, strategy: str = "ddp", *, static: bool = True) -> nn.Module:
    """``module`` for training on all ranks: its backward leaves the average of their gradients in ``grad``.

    With one process and "ddp" it is ``module`` itself. Weights and buffers become those of rank 0. A
    :class:`genfast.nn.BatchNormFlow` takes its statistics over all ranks from now on.

    Args:
        module: an :class:`Objective`; only its ``forward`` may be called for gradients.
        strategy: "ddp", every rank has all weights (torch.nn.parallel.DistributedDataParallel); or "fsdp", every rank
            has its shards of weights, gradients and optimiser state, and the blocks of the model (elements of its lists
            and sequences) are gathered one by one while they compute (torch.distributed.fsdp.fully_shard). Make the
            optimiser afterwards: the parameters are others.
        static: of "ddp", that every step uses the same parameters, maybe not all; without, each step must use all of
            them.

    Raises:
        ValueError: an unknown strategy, or "fsdp" without a process group.
    """
    check_strategy(strategy)
    for part in module.modules():
        if isinstance(part, BatchNormFlow):
            part.over_ranks = True
    if strategy == "ddp":
        if size() == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, static_graph=static)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.no_grad():
        for p in module.parameters():  # which must be contiguous: channels_last is lost
            p.data = p.data.contiguous()
        for t in (*module.parameters(), *module.buffers()):
            same = t.contiguous()
            dist.broadcast(same, 0)
            t.copy_(same)
    mesh = init_device_mesh(next(module.parameters()).device.type, (size(),))
    inner = module.model if isinstance(module, Objective) else module
    for block in _blocks(inner):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def full(t: Tensor) -> Tensor:
    """A tensor without its gradient, gathered from its shards if it is in shards; all ranks call this together."""
    from torch.distributed.tensor import DTensor

    plain: Tensor = t.full_tensor() if isinstance(t, DTensor) else t
    return plain.detach()


def sharded(module: nn.Module) -> bool:
    """Whether a module's parameters are shards."""
    if not _group():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(model: Any) -> Any:
    """The model itself or, if it is in shards, a plain copy with the gathered weights; all ranks call this together.

    Args:
        model: one of :mod:`genfast.models`, whose ``config`` rebuilds it.
    """
    if not sharded(model):
        return model
    like = next(model.parameters())
    with torch.random.fork_rng():  # the initial weights are drawn, and replaced
        plain = type(model)(**copy.deepcopy(model.config)).to(like.device, like.dtype)
    plain.load_state_dict({name: full(t) for name, t in model.state_dict().items()})
    modes = {name: m.training for name, m in model.named_modules()}
    for name, m in plain.named_modules():
        m.training = modes.get(name, model.training)
    return plain


# ---- samples ----


@torch.no_grad()
def sample(model: Any, n: int, *, generator: torch.Generator, **options: Any) -> Tensor:
    """``n`` samples on every rank, each drawn by one of them: those that ``model.sample(n, generator=generator)``
    draws.

    All ranks draw the random numbers of all ``n``, and turn their portion into samples.

    Args:
        model: one of :mod:`genfast.models`, with the same weights on all ranks (of one in shards: its :func:`whole`).
        generator: in the same state on all ranks.
        options: of the model's ``sample``, for all ``n``.

    Example:
        >>> import torch
        >>> from genfast import distributed, models
        >>> distributed.sample(models.MAF(4, hidden=8), 3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 4])
    """
    if size() == 1:
        drawn: Tensor = model.sample(n, generator=generator, **options)
        return drawn
    return gather(model.sample(n, generator=generator, rows=portion(max(n, 0)), **options))
