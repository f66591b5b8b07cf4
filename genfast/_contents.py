"""Whether tensors still hold what they held when something was made of them.

PyTorch counts changes in place, but not those that go through ``.data`` (moving averages of weights do), that fused optimisers
make, that another library writes into shared memory, or that the replay of a CUDA graph repeats. Contents alone tell.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._derived import ordinary, same_numbers


class Contents:
    """Copies of tensors, which nothing else can reach, to compare them with later; one read of each for a comparison.

    Example:
        >>> import torch
        >>> from genfast._contents import Contents
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> contents = Contents([weight])
        >>> contents.same([weight])
        True
        >>> _ = weight.data.mul_(2)
        >>> contents.same([weight])
        False
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        with ordinary():
            self.copies = tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in tensors)

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` have the dtypes, devices, shapes and elements that were copied.

        For tensors on a GPU this waits; :meth:`unchanged` does not.
        """
        if len(tensors) != len(self.copies):
            return False
        with torch.no_grad():
            for t, copy in zip(tensors, self.copies):
                if t.is_cpu and copy.is_cpu and type(t) in (Tensor, Parameter):
                    if not same_numbers(t, copy):
                        return False
                elif not _alike(t, copy) or not torch.equal(t, copy):
                    return False
        return True

    def unchanged(self, tensors: Sequence[Tensor]) -> Tensor:
        """The answer of :meth:`same` as a tensor on the device of the first one, of which nothing has waited."""
        device = tensors[0].device
        if len(tensors) != len(self.copies) or not all(map(_alike, tensors, self.copies)):
            return torch.zeros((), dtype=torch.bool, device=device)
        flags: list[Tensor] = []
        with torch.no_grad():
            for dtype, on in {(t.dtype, t.device): None for t in tensors}:
                which = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == (dtype, on)]
                both = [torch.cat([s[i].flatten() for i in which]) for s in (tensors, self.copies)]
                flags.append((both[0] == both[1]).all().to(device, non_blocking=True))
        return torch.stack(flags).all()


def _alike(t: Tensor, copy: Tensor) -> bool:
    return t.dtype == copy.dtype and t.device == copy.device and t.shape == copy.shape


_steps = 0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _count(*_: object) -> None:
    global _steps
    _steps += 1


@functools.cache
def _watch() -> None:
    register_optimizer_step_post_hook(_count)


def marks(tensors: Iterable[Tensor]) -> tuple[object, ...]:
    """What changes with most changes of tensors on a GPU, found without waiting for it: PyTorch's counts, the storages, and the
    steps of all optimisers of this process, since fused ones are not counted."""
    _watch()
    return (_steps, *((0 if t.is_inference() else t._version, t.data_ptr()) for t in tensors))
