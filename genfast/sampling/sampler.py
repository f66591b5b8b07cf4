"""sampling.Sampler: draws images from a causal network, with every activation computed once or by the standard loop."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _backend, _pool
from .._calls import Structure, state, without_numbers
from .._contents import Contents, marks
from ..reference.autoregressive import naive_sample
from ..reference.modes import evaluating
from . import self_check as checks
from .lowering import Lowered, LoweringError, lower
from .program import Program

_CPU: Any = _backend.extension("_cpu")[0]
_CUDA: Any = _backend.extension("_cuda")[0]
HEADS = ("categorical", "logistic_mixture")
METHODS = ("cached", "naive")
GROUP = 8  # images that a thread takes through the program together: enough rows for the products of a pixel
WAVE = 64 << 20  # bytes of feature maps that a thread holds at a time
SHAPES = 4  # programs that a sampler keeps
GPU_WAVE = 2 << 30  # bytes of feature maps on a GPU at a time


def _takes_context(network: nn.Module) -> bool:
    return "context" in inspect.signature(network.forward).parameters


@dataclass
class _Prepared:
    """A program, and what the network was when it was made."""

    lowered: Lowered
    structure: Structure
    contents: Contents
    marks: tuple[object, ...]
    checked: bool = False

    def serves(self, structure: Structure, tensors: list[Tensor], device: torch.device) -> bool:
        if self.structure != structure:
            return False
        # Contents on a GPU are compared behind the launch, since looking at them here would wait.
        return self.marks == marks(tensors) if device.type == "cuda" else self.contents.same(tensors)


class Sampler:
    """Draws integer images from a network of :mod:`genfast.nn` layers.

    The network is lowered once to a pixel program (:meth:`prepare`; ``print`` shows it); weights are folded and packed
    again whenever they, a setting or a hook have changed, which is found by comparing their contents. On a GPU that would
    wait for it: there steps of optimisers, loading and ordinary changes in place are seen, and after one that goes through
    ``.data`` the images hold -1 everywhere until :meth:`renew` is called.

    The first time that a program is made, and again when the network's structure has changed, what it computes for a random
    image is compared with what the network computes (about two forward passes); a difference beyond rounding is a
    :class:`LoweringError` that names the layer where it begins.

    Given the same uniform numbers, "cached" draws the same images as "naive" (up to rounding: a draw that lands within about
    1e-7 of the border between two levels may fall on either).

    Args:
        network: integer images (N, C, H, W), sequences (N, C, L) or videos (N, C, T, H, W) to logits (N, levels * C, ...),
            level by level, or to mixture parameters (see :func:`genfast.ops.discretized_logistic_mixture_nll`); called as
            ``network(x)`` or ``network(x, context)``.
        levels: of a colour.
        head: "categorical" or "logistic_mixture".
        self_check: False leaves out the comparison with the network.

    Raises:
        ValueError: an unknown head.

    Example:
        >>> import torch, genfast
        >>> net = torch.nn.Sequential(genfast.nn.ScaleLevels(4), genfast.nn.MaskedConv2d(1, 4, 3, mask_type="A"))
        >>> sampler = genfast.sampling.Sampler(net, levels=4)
        >>> sampler.sample(2, (1, 5, 6)).shape
        torch.Size([2, 1, 5, 6])
    """

    def __init__(
        self, network: nn.Module, *, levels: int = 256, head: str = "categorical", self_check: bool = True
    ) -> None:  # fmt: skip
        if head not in HEADS:
            raise ValueError(f"Sampler: head={head!r}, expected one of {', '.join(map(repr, HEADS))}")
        if levels < 2:
            raise ValueError(f"Sampler: levels={levels}, expected at least 2")
        self.network, self.levels, self.head, self.self_check = network, levels, head, self_check
        self._prepared: dict[Any, _Prepared] = {}
        self._proven: dict[Any, Any] = {}  # by shape: the structure whose program agreed with the network

    # ---- preparing ----

    def _device(self) -> torch.device:
        """Where images are drawn: the GPU that holds the network, or the CPU."""
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        return device if device.type == "cuda" else torch.device("cpu")

    def prepare(self, shape: Sequence[int], *, has_context: bool = False) -> Program:
        """The pixel program for images of ``shape`` (C, H, W) or sequences (C, L), lowered anew if the network has changed.

        With a context the program is compared with the network when the first one is given.

        Raises:
            LoweringError: names the module that has no pixel program, or whose program computes something else.
        """
        return self._program(tuple(shape), has_context).lowered.program

    def renew(self) -> None:
        """Forgets all programs, so that weights are packed anew."""
        self._prepared.clear()

    def _lowered(self, shape: tuple[int, ...], has_context: bool, record_all: bool = False) -> Lowered:
        frames = shape[1] if len(shape) == 4 else 1
        full = (shape[0], shape[1] * shape[2] if len(shape) == 4 else shape[1], shape[-1] if len(shape) > 2 else 1)
        device = self._device()
        with evaluating(self.network):
            lowered = lower(
                self.network,
                full,
                levels=self.levels,
                head=self.head,
                has_context=has_context,
                frames=frames,
                panel=0 if device.type == "cuda" else None,
                dims=len(shape) - 1,
                record_all=record_all,
            )
        if device.type == "cuda":
            _to_gpu(lowered.program, device)
        return lowered

    def _program(self, shape: tuple[int, ...], has_context: bool) -> _Prepared:
        structure, tensors = state(self.network)
        found = self._prepared.get((shape, has_context))
        if found is None or not found.serves(structure, tensors, self._device()):
            contents, before = Contents(tensors), marks(tensors)
            found = _Prepared(self._lowered(shape, has_context), structure, contents, before)
            if len(self._prepared) >= SHAPES:
                self._prepared.clear()
            self._prepared[(shape, has_context)] = found
            if not has_context:
                self._prove(found, shape, None)
        return found

    def _prove(self, prepared: _Prepared, shape: tuple[int, ...], context: Tensor | None) -> None:
        """Compares a program with the network on a random image, teacher forced, unless this structure has passed before."""
        if (
            prepared.checked
            or not self.self_check
            or not checks.can_look(self._device())
            or (context is not None and not len(context))
        ):
            return
        program = prepared.lowered.program
        # Numbers among the settings may count calls; those that matter are in the program.
        key = without_numbers(prepared.structure), program.code.tolist(), prepared.lowered.graph.code
        if self._proven.get((shape, context is None)) == key:
            prepared.checked = True
            return
        device = next((t.device for t in self.network.parameters()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(self.levels, (1, *shape), generator=generator).to(device)
        rest = () if context is None else (context[:1],)
        try:
            with checks.quietly(device), evaluating(self.network), _buffers_as_they_were(self.network):
                prepared.lowered.statics(context)  # an error names the condition as it was given
                found = self._forced(prepared.lowered, image, context=None if context is None else context[:1])
                expected = self.network(image, *rest)
                if prepared.lowered.blocked:
                    found = found.unflatten(1, (self.levels, shape[0])).transpose(1, 2).flatten(1, 2)
                error = checks.beyond_rounding(
                    found.to(expected.device), expected, lambda: checks.in_both_precisions(self.network, _called(image, *rest))
                )
                if error is not None:
                    lowered = self._lowered(shape, context is not None, record_all=True)
                    record = self._recorded(lowered, image, context=None if context is None else context[:1])[0]
                    at = checks.first_difference(lowered, record, lambda: self.network(image, *rest), (image, *rest))
                    raise checks.SelfCheckError(
                        f"{type(self.network).__name__}: its pixel program differs from the network by {error:.2g} of the "
                        f"largest output on a random image, and the difference begins at {at}; sample with method='naive', or "
                        "switch the comparison off with self_check=False"
                    )
        except BaseException:
            self._prepared.pop((shape, context is not None), None)  # not to be trusted the next time either
            raise
        prepared.checked = True
        if bool(expected.isfinite().all()):
            self._proven[(shape, context is None)] = key

    def uniforms_per_pixel(self, channels: int) -> int:
        """Random numbers that a pixel takes: one a colour, and one for the mixture."""
        return channels if self.head == "categorical" else 1 + channels

    # ---- drawing ----

    @torch.no_grad()
    def sample(
        self, n: int, shape: Sequence[int], *, method: str = "cached", context: Tensor | None = None,
        temperature: float = 1.0, prefix: Tensor | None = None, uniforms: Tensor | None = None,
        generator: torch.Generator | None = None, progress: bool = False,
    ) -> Tensor:  # fmt: skip
        """Draws ``n`` images.

        Args:
            shape: (C, H, W), (C, L) of a sequence or (C, T, H, W) of a video.
            method: "cached" computes every activation once; "naive" is the standard loop, one forward pass for each pixel
                (and colour), for networks that have no pixel program.
            context: (n, ...) as the network takes it.
            temperature: divides the logits, or multiplies the scales of a mixture and divides its logits.
            prefix: (n or 1, C, h, W) whole numbers: the first h rows, kept as given; of a sequence
                (n or 1, C, l) the first l samples, of a video (n or 1, C, t, H, W) the first t frames.
            uniforms: (n, K, H, W) in [0, 1), K = :meth:`uniforms_per_pixel`; drawn with ``generator`` if None.
            progress: shows a bar over the rows.

        Returns:
            (n, C, H, W) or (n, C, L), int64, where the network is: on its CUDA GPU, or else on the CPU.

        Raises:
            ValueError: arguments that do not fit, by name.
            LoweringError: the network has no pixel program; ``method="naive"`` needs none.
            KeyboardInterrupt: nothing is left behind.
        """
        shape = tuple(shape)
        images, uniforms, given = self._checked(n, shape, method, temperature, prefix, uniforms, generator, context)
        if method == "naive":
            return naive_sample(
                self.network, images, uniforms, given, levels=self.levels, head=self.head, context=context,
                temperature=temperature, progress=progress,
            )  # fmt: skip
        self._run(images, uniforms, given, context, temperature, progress, None)
        return images

    @torch.no_grad()
    def teacher_forced(self, images: Tensor, *, context: Tensor | None = None) -> Tensor:
        """What each pixel of ``images`` (N, C, H, W) would be drawn from, by the cached engine: the network's output."""
        shape = tuple(images.shape[1:])
        images = images.to(self._device(), torch.int64).contiguous()
        prepared = self._program(shape, context is not None)
        self._prove(prepared, shape, context)
        out = self._forced(prepared.lowered, images, context)
        return out if not images.is_cuda else out.masked_fill(~self._unchanged(prepared), float("nan"))

    def _recorded(self, lowered: Lowered, images: Tensor, context: Tensor | None) -> Tensor:
        """(N, H, W, numbers) what a program records for given images."""
        program, shape = lowered.program, images.shape[1:]
        images = images.to(self._device(), torch.int64, copy=True)
        size = (len(images), program.height, program.width, program.record)
        record = torch.zeros(size, device=images.device, dtype=torch.float32)
        uniforms = torch.zeros(len(images), program.uniforms, *shape[1:], device=images.device, dtype=torch.float32)
        self._execute(lowered, images, uniforms, shape[1], context, 1.0, False, record)
        return record

    def _forced(self, lowered: Lowered, images: Tensor, context: Tensor | None) -> Tensor:
        """What a program computes for given images, as the network gives it."""
        shape = images.shape[1:]
        out = self._recorded(lowered, images, context).movedim(-1, 1)
        if self.head == "categorical":  # recorded colour by colour
            out = out.unflatten(1, (shape[0], self.levels)).transpose(1, 2).flatten(1, 2)
        return out.reshape(len(images), lowered.program.record, *shape[1:])

    def _unchanged(self, prepared: _Prepared) -> Tensor:
        """bool (): whether the GPU's weights are still those that were packed; nothing waits for it."""
        return prepared.contents.unchanged(state(self.network)[1])

    def _checked(
        self, n: int, shape: tuple[int, ...], method: str, temperature: float, prefix: Tensor | None,
        uniforms: Tensor | None, generator: torch.Generator | None, context: Tensor | None,
    ) -> tuple[Tensor, Tensor, int]:  # fmt: skip
        if method not in METHODS:
            raise ValueError(f"sample: method={method!r}, expected one of {', '.join(map(repr, METHODS))}")
        if n < 0:
            raise ValueError(f"sample: n={n}, expected at least 0")
        if len(shape) not in (2, 3, 4) or min(shape) < 1:
            raise ValueError(f"sample: shape={shape}, expected (C, H, W), (C, L) or (C, T, H, W)")
        if not temperature > 0:
            raise ValueError(f"sample: temperature={temperature}, expected above 0")
        if context is not None and not _takes_context(self.network):
            raise ValueError("sample: context was given, but the network takes none")
        if context is not None and len(context) != n:
            raise ValueError(f"sample: context has {len(context)} rows, expected n={n}")
        wanted, device = (n, self.uniforms_per_pixel(shape[0]), *shape[1:]), self._device()
        if uniforms is None:
            uniforms = torch.rand(wanted, generator=generator, device=device if generator is None else generator.device)
        elif tuple(uniforms.shape) != wanted:
            raise ValueError(f"sample: uniforms have shape {tuple(uniforms.shape)}, expected {wanted}")
        uniforms = uniforms.to(device, torch.float32).contiguous()
        images = torch.zeros((n, *shape), dtype=torch.int64, device=device)
        if prefix is None:
            return images, uniforms, 0
        if prefix.is_floating_point():
            raise TypeError(f"sample: prefix has dtype {prefix.dtype}, expected whole numbers")
        fits = prefix.dim() == len(shape) + 1 and prefix.shape[0] in (1, n) and prefix.shape[1] == shape[0]
        if not fits or prefix.shape[3:] != shape[2:] or prefix.shape[2] > shape[1]:
            rest = "".join(f", {s}" for s in shape[2:])
            raise ValueError(
                f"sample: prefix has shape {tuple(prefix.shape)}, expected ({n} or 1, {shape[0]}, at most {shape[1]}{rest})"
            )
        if prefix.is_cuda:
            torch._assert_async(
                ((prefix >= 0) & (prefix < self.levels)).all(), f"sample: prefix holds values beyond 0 to {self.levels - 1}"
            )
        elif prefix.numel() and (int(prefix.min()) < 0 or int(prefix.max()) >= self.levels):
            raise ValueError(
                f"sample: prefix holds values from {int(prefix.min())} to {int(prefix.max())}, expected 0 to {self.levels - 1}"
            )
        images[:, :, : prefix.shape[2]] = prefix
        return images, uniforms, prefix.shape[2]

    def _run(
        self, images: Tensor, uniforms: Tensor, given: int, context: Tensor | None, temperature: float, progress: bool,
        record: Tensor | None,
    ) -> None:  # fmt: skip
        shape = tuple(images.shape[1:])
        prepared = self._program(shape, context is not None)
        self._prove(prepared, shape, context)
        self._execute(prepared.lowered, images, uniforms, given, context, temperature, progress, record)
        if images.is_cuda:
            images.masked_fill_(~self._unchanged(prepared), -1)

    def _execute(
        self, lowered: Lowered, images: Tensor, uniforms: Tensor, given: int, context: Tensor | None, temperature: float,
        progress: bool, record: Tensor | None,
    ) -> None:  # fmt: skip
        if _CPU is None and not images.is_cuda:
            raise _backend.BackendError(f"genfast::pixel_program: {_backend.extension('_cpu')[1]}")
        program = lowered.program
        with evaluating(self.network):
            statics = lowered.statics(context)
        if images.is_cuda:
            _run_on_gpu(program, statics, images, uniforms, given, temperature, progress, record)
            return
        threads = torch.get_num_threads()
        nbytes = max(1, program.image_floats * 4)
        wave = max(threads, threads * min(WAVE // nbytes, 8 * GROUP))
        starts, height = range(0, len(images), wave), program.frames * program.period
        given = given * (program.active if program.frames > 1 else 1)  # frames to rows
        with _bar(progress, len(starts) * height) as advance:
            for start in starts:
                part = slice(start, start + wave)
                count = len(images[part])
                cache = _pool.empty_strided((count * program.image_floats + 64,), (1,), torch.float32).zero_()
                maps = torch.tensor([_map(m, start) for m in statics], dtype=torch.int64)
                row, rows = 0, max(1, height // 64)
                while row < height:
                    _CPU.pixel_program(
                        program.code.data_ptr(), program.weights.data_ptr(), maps.data_ptr(), cache.data_ptr(),
                        images[part].data_ptr(), uniforms[part].data_ptr(), 0 if record is None else record[part].data_ptr(),
                        program.record, count, GROUP, row, min(row + rows, height), given, program.period, program.active,
                        temperature, threads,
                    )  # fmt: skip
                    advance(min(rows, height - row))
                    row += rows


def _called(image: Tensor, *rest: Tensor) -> Callable[[nn.Module, torch.dtype], Tensor]:
    """A call of the network in another precision, which its condition takes too."""

    def call(network: nn.Module, dtype: torch.dtype) -> Tensor:
        out: Tensor = network(image, *(t.to(dtype) if t.is_floating_point() else t for t in rest))
        return out

    return call


@contextlib.contextmanager
def _buffers_as_they_were(network: nn.Module) -> Iterator[None]:
    """Puts back buffers that a forward pass has written into."""
    before = [(b, b.detach().clone()) for b in network.buffers()]
    try:
        yield
    finally:
        for buffer, values in before:
            if not torch.equal(buffer, values):
                with torch.no_grad():
                    buffer.copy_(values)


def _map(values: Tensor, first: int) -> list[int]:
    """A condition (N or 1, rows or 1, columns or 1, channels) from image ``first`` on: its address and its three strides."""
    steps = [s if size > 1 else 0 for s, size in zip(values.stride(), values.shape[:3])]
    return [values.data_ptr() + 4 * first * steps[0], *steps]


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Whole numbers on a GPU, which get there as arguments of a launch: a graph captures no copy from pageable memory."""
    found = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    if numbers:
        torch._foreach_add_(list(found.unbind()), numbers)
    return found


def _to_gpu(program: Program, device: torch.device) -> None:
    """Moves what csrc/cuda/pixel_program.cu reads, which counts in 32 bits."""
    largest = max(program.weights.numel(), program.image_floats)
    if largest >= 2**31:
        raise LoweringError(f"the program has {largest} weights or values of an image, the GPU's engine takes less than 2^31")
    program.code, program.weights = program.code.to(device, torch.int32), program.weights.to(device)


def _run_on_gpu(
    program: Program, statics: list[Tensor], images: Tensor, uniforms: Tensor, given: int, temperature: float, progress: bool,
    record: Tensor | None,
) -> None:  # fmt: skip
    """One launch for some rows of as many images as fit, on the current stream; waits for none unless progress is shown."""
    if program.frames > 1:
        raise _backend.BackendError("genfast::pixel_program: the GPU engine takes no videos; move the network to the CPU")
    if _CUDA is None:
        raise _backend.BackendError(f"genfast::pixel_program: {_backend.extension('_cuda')[1]}")
    wave, rows = max(1, GPU_WAVE // (4 * max(1, program.image_floats))), max(1, program.height // 64)
    starts = range(0, len(images), wave)
    with _bar(progress, len(starts) * program.height) as advance, torch.cuda.device(images.device):
        stream = torch.cuda.current_stream()
        for start in starts:
            part = slice(start, start + wave)
            count = len(images[part])
            cache = torch.zeros(count * program.image_floats, device=images.device)
            scratch = torch.empty(count, program.levels, dtype=torch.float64, device=images.device)
            maps = _on_device([number for m in statics for number in _map(m, start)], images.device)
            for row in range(0, program.height, rows):
                last = min(row + rows, program.height)
                _CUDA.pixel_program(
                    stream.cuda_stream, program.code.data_ptr(), program.weights.data_ptr(), maps.data_ptr(), cache.data_ptr(),
                    images[part].data_ptr(), uniforms[part].data_ptr(), 0 if record is None else record[part].data_ptr(),
                    scratch.data_ptr(), program.code.numel(), program.weights.numel(), program.image_floats, program.record,
                    count, row, last, given, temperature,
                )  # fmt: skip
                if progress:
                    stream.synchronize()
                advance(last - row)


class _bar:
    """A progress bar over rows, or nothing."""

    def __init__(self, shown: bool, total: int) -> None:
        self.shown, self.total = shown, total
        self.bar: Any = None

    def __enter__(self) -> Callable[[int], Any]:
        if not self.shown:
            return lambda rows: None
        from tqdm import tqdm

        self.bar = tqdm(total=self.total, unit="row", disable=None)
        update: Callable[[int], Any] = self.bar.update
        return update

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
