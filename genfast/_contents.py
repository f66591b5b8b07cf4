"""Whether tensors still hold what they held when something was made of them.

PyTorch counts changes in place, but not those that go through ``.data`` (moving averages of weights do), that fused optimisers
make, that another library writes into shared memory, or that the replay of a CUDA graph repeats. Contents alone tell.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._compiler import uncompiled
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
        """Whether ``tensors`` have the dtypes, devices, shapes and, bit by bit, the elements that were copied.

        For tensors on a GPU this waits; :meth:`unchanged` does not.
        """
        with torch.no_grad():
            return self._alike(tensors) and all(
                same_numbers(t, copy) if t.is_cpu else torch.equal(t, copy) for t, copy in zip(tensors, self.copies)
            )

    def _alike(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self.copies) and all(
            t.dtype == copy.dtype and t.device == copy.device and t.shape == copy.shape for t, copy in zip(tensors, self.copies)
        )

    def unchanged(self, tensors: Sequence[Tensor]) -> Tensor:
        """The answer of :meth:`same` as a tensor on the device of the first one, of which nothing has waited."""
        device = tensors[0].device
        if not self._alike(tensors):
            return torch.zeros((), dtype=torch.bool, device=device)
        flags: list[Tensor] = []
        with torch.no_grad():
            for dtype, on in {(t.dtype, t.device): None for t in tensors}:
                which = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == (dtype, on)]
                both = [torch.cat([s[i].flatten() for i in which]) for s in (tensors, self.copies)]
                flags.append((both[0] == both[1]).all().to(device, non_blocking=True))
        return torch.stack(flags).all()


_steps = 0


@uncompiled("it counts in Python")
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
