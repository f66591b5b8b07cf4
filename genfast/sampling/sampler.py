"""sampling.Sampler: draws images from a causal network, with every activation computed once or by the standard loop."""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _allocator, _backend
from .._calls import Structure, hook_in_the_way, state, without_numbers
from .._contents import Contents, marks
from .._derived import readable_module
from .._modes import evaluating
from .._native import kernels
from ..nn.masked_conv import MaskedConv1d, MaskedConv2d, MaskedConv3d
from ..programs import self_check as checks
from ..programs.errors import LoweringError
from ..programs.pixel_program import Program
from . import inputs
from .first_difference import first_difference
from .inputs import Conditions, Context, Entrance, Input, Unknown
from .lowering import Lowered, lower
from .naive import head_channels, naive_sample, not_drawable
from .steps import NotCausalError

_FIELDS = (
    "program weights statics cache images uniforms record faults record_size n first_row last_row given temperature"
)
_CPU = kernels("_cpu", pixel_program=f"{_FIELDS} group period active threads")
_CUDA = kernels("_cuda", pixel_program=f"{_FIELDS} stream scratch code weight_floats image_floats")
HEADS = ("categorical", "logistic_mixture")
METHODS = ("auto", "cached", "naive")
ORDERS = ("interleaved", "blocked")
GROUP = 8  # images that a thread takes through the program together: enough rows for the products of a pixel
WAVE = 64 << 20  # bytes of feature maps that a thread holds at a time
SHAPES = 4  # programs that a sampler keeps
GPU_WAVE = 2 << 30  # bytes of feature maps on a GPU at a time


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
    """Draws integer images from a network of :mod:`genfast.nn` layers, or by the standard loop from any network.

    The network is lowered once to a pixel program (:meth:`prepare`; ``print`` shows it); weights are folded and packed
    again whenever they, a setting or a hook have changed, which is found by comparing their contents. On a GPU that
    would
    wait for it: there steps of optimisers, loading and ordinary changes in place are seen, and after one that goes
        through
    ``.data`` the images hold -1 everywhere until :meth:`renew` is called.

    The first time that a program is made, and again when the network's structure has changed, what it computes for a
    random image is compared with what the network computes (about two forward passes); a difference beyond rounding is
    a
    :class:`LoweringError` that names the layer where it begins.

    Given the same uniform numbers, "cached" draws the same images as "naive" (up to rounding: a draw that lands within
    about 1e-7 of the border between two levels may fall on either).

    Args:
        network: images (N, C, H, W), sequences (N, C, L) or videos (N, C, T, H, W) to logits (N, levels * C, ...),
            level by level (see ``group_order``), or to mixture parameters (see
            :func:`genfast.ops.discretized_logistic_mixture_nll`). A module, also within ``torch.compile`` or
            ``DataParallel``, or for ``method="naive"`` any function. Modules are in evaluation mode while they are
            sampled from; then each submodule gets its own mode back.
        levels: of a colour.
        head: "categorical" or "logistic_mixture".
        input: what the network is given for the levels 0 ... L - 1: "integers" (int64, as they are), "unit" (x / (L -
            1), in [0, 1]), "signed" (2 x / (L - 1) - 1, in [-1, 1]), both in the type of its parameters, or a function
            of the int64 images. None finds out whether the network takes whole numbers (it converts, embeds or compares
            them, or scales them into [-1, 1]), by calling it once, and is an error where it takes floats.
        group_order: how the logits of C colours lie: "interleaved", channel c is of colour c mod C, or "blocked",
            colour by colour. None takes the order of the network's masked convolutions, or that in which its outputs
            are causal.
        self_check: False leaves out the comparison with the network.

    The engine computes in float32, so networks of another type have no pixel program.

    Raises:
        ValueError: an unknown head, input or group_order.

    Example:
        >>> import torch, genfast
        >>> net = torch.nn.Sequential(genfast.nn.ScaleLevels(4), genfast.nn.MaskedConv2d(1, 4, 3, mask_type="A"))
        >>> sampler = genfast.sampling.Sampler(net, levels=4)
        >>> sampler.sample(2, (1, 5, 6)).shape
        torch.Size([2, 1, 5, 6])
    """

    def __init__(
        self,
        network: Callable[..., Any],
        *,
        levels: int = 256,
        head: str = "categorical",
        input: Input = None,
        group_order: str | None = None,
        self_check: bool = True,
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"Sampler: head={head!r}, expected one of {', '.join(map(repr, HEADS))}")
        if levels < 2:
            raise ValueError(f"Sampler: levels={levels}, expected at least 2")
        if group_order is not None and group_order not in ORDERS:
            raise ValueError(
                f"Sampler: group_order={group_order!r}, expected one of {', '.join(map(repr, ORDERS))} or None"
            )
        if not callable(network):
            raise TypeError(f"Sampler: network is a {type(network).__name__}, expected a module or a function")
        inputs.check_input("Sampler", input)
        self.network, self.levels, self.head, self.self_check = network, levels, head, self_check
        self.input, self.group_order = input, group_order
        self._forget()

    def _forget(self) -> None:
        self._prepared: dict[Any, _Prepared] = {}
        self._proven: dict[
            Any, Any
        ] = {}  # by shape and conditions: the structure whose program agreed with the network
        self._entrances: dict[tuple[int, ...], Entrance] = {}
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Without programs, which are made anew."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_prepared", "_proven", "_entrances", "_warned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # ---- preparing ----

    def _modules(self) -> list[nn.Module]:
        return inputs.modules_of(self.network)

    def _device(self) -> torch.device:
        """Where images are drawn: the GPU that holds the network, or the CPU."""
        device = next((p.device for m in self._modules() for p in m.parameters()), torch.device("cpu"))
        return device if device.type == "cuda" else torch.device("cpu")

    def _enters(self, name: str, shape: tuple[int, ...], conditions: Conditions, n: int = 1) -> Entrance:
        """How whole numbers enter the network: asked of it once for a shape, but for our own models, which say so."""
        value = inputs.own_input(self.network) if self.input is None else self.input
        if value is not None and inputs.own_input(self.network) is not None:
            return Entrance(value, False, 0)
        if shape not in self._entrances:
            if any(isinstance(v, Unknown) for _, v in conditions.items()):
                return Entrance(value, False, 0)  # not asked without a condition; a layer that takes floats will say so
            with inputs.probing(self.network, self._device()):
                rows = 1 if isinstance(self.network, nn.Module) else n  # a function may hold conditions of its own
                found = inputs.entrance(name, self.network, conditions, shape, self.levels, value, self._device(), rows)
            if len(self._entrances) >= SHAPES:
                self._entrances.clear()
            self._entrances[shape] = found
        return self._entrances[shape]

    def _called(self, name: str, images: Tensor, conditions: Conditions) -> Tensor:
        """The network's output for whole numbers, in the mode that it is in."""
        value = self._enters(name, tuple(images.shape[1:]), conditions, len(images)).input
        fed = inputs.feed(images, value, self.levels, inputs.dtype_of(self.network))
        out: Tensor = conditions.call(self.network, fed)
        return out

    def _declared_order(self) -> str | None:
        """The order of the colours in the network's masked convolutions, if they have several and one order."""
        convs = [
            c for m in self._modules() for c in m.modules() if isinstance(c, (MaskedConv1d, MaskedConv2d, MaskedConv3d))
        ]
        orders = {c.group_order for c in convs if c.data_channels > 1}
        return next(iter(orders)) if len(orders) == 1 else None

    def _order(self, name: str, shape: tuple[int, ...], conditions: Conditions) -> str:
        """How the logits of several colours lie: as said, or as the network's outputs depend on the colours of their
        pixel.

        At one pixel, a logit of the first colour moves with none of its own pixel's colours, one of the second with the
        first alone, and so on; so the order shows in what moves, whatever layers the network is made of.
        """
        colours = shape[0]
        if self.group_order is not None or self.head != "categorical" or colours == 1:
            return self.group_order or "interleaved"
        if inputs.own_input(self.network) is not None:
            return "interleaved"  # of all our models
        images = torch.randint(self.levels, (1, *shape), generator=torch.Generator().manual_seed(0)).to(self._device())
        at = tuple(s // 2 for s in shape[1:])
        changed = images.repeat(1 + colours, *(1,) * len(shape))
        for c in range(colours):
            place: tuple[Any, ...] = (1 + c, c, *at)
            changed[place] = (changed[place] + max(1, self.levels // 2)) % self.levels
        with inputs.probing(self.network, self._device()):
            out = self._called(name, changed, conditions.rows(slice(0, 1)).expanded(1 + colours))
        head_channels(name, out, changed, self.levels, self.head)
        every: tuple[Any, ...] = (slice(None), slice(None), *at)
        here = out[every].double()
        rounding = (1e3 if out.element_size() >= 4 else 16) * torch.finfo(out.dtype).eps
        moved = (here[1:] - here[:1]).abs() > rounding * here.abs().max()  # (C, levels * C)
        number = torch.arange(moved.shape[1], device=moved.device)
        causal = {
            order: not bool((moved & (torch.arange(colours, device=moved.device)[:, None] >= of)).any())
            for order, of in (("interleaved", number % colours), ("blocked", number // self.levels))
        }
        declared = self._declared_order()
        for order in (declared, *ORDERS):
            if order is not None and causal[order]:
                return order
        raise NotCausalError(
            f"{name}: {inputs.name_of(self.network)} lets logits at {at} see their own or a later colour of their "
            "pixel, whether they lie level by level (interleaved) or colour by colour (blocked)"
        )

    def prepare(self, shape: Sequence[int], *, has_context: bool = False, context: Context = None) -> Program:
        """The pixel program for images of ``shape`` (C, H, W) or sequences (C, L), lowered anew if the network has
        changed.

        Args:
            has_context: the network gets a condition, of which nothing else is known yet; the program is compared with
                the network when the first one is given.
            context: as of :meth:`sample`, of any number of rows.

        Raises:
            LoweringError: names the module that has no pixel program, or whose program computes something else.
        """
        context = Unknown() if context is None and has_context else context  # type: ignore[assignment]
        return self._program(tuple(shape), inputs.bind("prepare", self.network, context)).lowered.program

    def renew(self) -> None:
        """Forgets all programs, so that weights are packed anew."""
        self._prepared.clear()

    def _lowerable(self) -> nn.Module:
        """The module that is lowered: the network without what compiles it or spreads it over devices."""
        network = inputs.unwrapped(self.network)
        if not isinstance(network, nn.Module):
            raise LoweringError(
                f"{inputs.name_of(network)}: a {type(network).__name__} has no pixel program, a module may have"
            )
        for wrapper in inputs.wrappers(self.network):
            hook = hook_in_the_way(wrapper)
            if hook:
                raise LoweringError(f"the network ({type(wrapper).__name__}): has {hook}, which no pixel program runs")
        other = {p.dtype for p in network.parameters() if p.is_floating_point()} - {torch.float32}
        if other:
            raise LoweringError(
                f"{inputs.name_of(network)}: its parameters are {', '.join(sorted(map(str, other)))}, and the engine "
                "computes in float32; give it network.float(), or sample with method='naive'"
            )
        return network

    def _lowered(self, shape: tuple[int, ...], conditions: Conditions, record_all: bool = False) -> Lowered:
        frames = shape[1] if len(shape) == 4 else 1
        full = (shape[0], shape[1] * shape[2] if len(shape) == 4 else shape[1], shape[-1] if len(shape) > 2 else 1)
        network, device = self._lowerable(), self._device()
        value = self._enters("sample", shape, conditions).input
        try:
            entry = inputs.entry("sample", value, shape, self.levels, device)
        except ValueError as error:
            raise LoweringError(f"{error}; method='naive' takes any") from error
        with inputs.probing(network, device):  # a trace runs what does not hang on the image, such as random numbers
            lowered = lower(
                network,
                full,
                levels=self.levels,
                head=self.head,
                conditions=conditions.rows(slice(0, 1)),
                entry=entry,
                group_order=self.group_order,
                frames=frames,
                panel=0 if device.type == "cuda" else None,
                dims=len(shape) - 1,
                record_all=record_all,
            )
        if device.type == "cuda":
            _to_gpu(lowered.program, device)
        return lowered

    def _program(self, shape: tuple[int, ...], conditions: Conditions) -> _Prepared:
        structure, tensors = state(self._lowerable())
        key = shape, conditions.structure()
        found = self._prepared.get(key)
        if found is None or not found.serves(structure, tensors, self._device()):
            contents, before = Contents(tensors), marks(tensors)
            found = _Prepared(self._lowered(shape, conditions), structure, contents, before)
            if len(self._prepared) >= SHAPES:
                self._prepared.clear()
            self._prepared[key] = found
            if not any(isinstance(v, Unknown) for _, v in conditions.items()):
                self._prove(found, shape, conditions)
        return found

    def _prove(self, prepared: _Prepared, shape: tuple[int, ...], conditions: Conditions) -> None:
        """Compares a program with the network on a random image, teacher forced, unless this structure has passed
        before."""
        one = conditions.rows(slice(0, 1))
        if prepared.checked or not self.self_check or any(not len(t) for t in one.tensors()):
            return
        if not checks.can_look(self._device()) or not readable_module(self._lowerable()):
            return
        place = shape, conditions.structure()
        program = prepared.lowered.program
        # Numbers among the settings may count calls; those that matter are in the program.
        key = without_numbers(prepared.structure), program.code.tolist(), prepared.lowered.graph.code
        if self._proven.get(place) == key:
            prepared.checked = True
            return
        network, value = self._lowerable(), self._enters("sample", shape, conditions).input
        device = next((t.device for t in network.parameters()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(self.levels, (1, *shape), generator=generator).to(device)
        fed = inputs.feed(image, value, self.levels, inputs.dtype_of(network))

        def in_precision(network: nn.Module, dtype: torch.dtype) -> Tensor:
            """A call of the network in another precision, which its condition takes too."""
            given = one.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
            out: Tensor = given.call(network, inputs.feed(image, value, self.levels, dtype))
            return out

        try:
            with checks.quietly(device), evaluating(network), inputs.buffers_as_they_were(network):
                prepared.lowered.statics(conditions)  # an error names the condition as it was given
                found = self._forced(prepared.lowered, image, one)
                expected = one.call(network, fed)
                head_channels("sample", expected, image, self.levels, self.head)
                error = checks.beyond_rounding(
                    found.to(expected.device), expected, lambda: checks.in_both_precisions(network, in_precision)
                )
                if (
                    error is not None
                    and math.isnan(error)
                    and not all(bool(t.isfinite().all()) for t in network.parameters())
                ):
                    # weights that are not finite, which spread otherwise at a border: the drawing says at which pixel
                    return
                if error is not None:
                    lowered = self._lowered(shape, conditions, record_all=True)
                    record = self._recorded(lowered, image, one)[0]
                    at = first_difference(lowered, record, lambda: one.call(network, fed), (fed, *one.tensors()), error)
                    raise checks.SelfCheckError(
                        f"{type(network).__name__}: its pixel program differs from the network by {error:.2g} of the "
                        f"largest output on a random image, and the difference begins at {at}; sample with "
                        "method='naive', or switch the comparison off with self_check=False"
                    )
        except BaseException:
            self._prepared.pop(place, None)  # not to be trusted the next time either
            raise
        prepared.checked = True
        if bool(expected.isfinite().all()):
            self._proven[place] = key

    def uniforms_per_pixel(self, channels: int) -> int:
        """Random numbers that a pixel takes: one a colour, and one for the mixture."""
        return channels if self.head == "categorical" else 1 + channels

    # ---- drawing ----

    @torch.no_grad()
    def sample(
        self,
        n: int,
        shape: Sequence[int],
        *,
        method: str = "auto",
        context: Context = None,
        temperature: float = 1.0,
        prefix: Tensor | None = None,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draws ``n`` images.

        Args:
            shape: (C, H, W), (C, L) of a sequence or (C, T, H, W) of a video.
            method: "cached" computes every activation once; "naive" is the standard loop, one forward pass for each
                pixel (and colour), for networks that have no pixel program; "auto" is "cached" for networks that have
                one, and otherwise "naive", with a warning that says why.
            context: the network's condition, (n, ...) as it takes it, of any type; of several a sequence, in the order
                of the network's arguments, or a dict by their names. What is no tensor, or has no axes, is passed on as
                it is.
            temperature: divides the logits, or multiplies the scales of a mixture and divides its logits.
            prefix: (n or 1, C, h, W) whole numbers: the first h rows, kept as given; of a sequence
                (n or 1, C, l) the first l samples, of a video (n or 1, C, t, H, W) the first t frames.
            uniforms: (n, K, H, W) in [0, 1), K = :meth:`uniforms_per_pixel`; drawn with ``generator`` if None.
            progress: shows a bar over the rows.

        Returns:
            (n, C, H, W) or (n, C, L), int64, where the network is: on its CUDA GPU, or else on the CPU.

        Raises:
            ValueError: arguments that do not fit, by name; a network that takes floats without ``input``.
            FloatingPointError: logits or mixture parameters that are not finite, with the image, the colour and the
                position; a logit of -inf only forbids its level. By the engine on a GPU, an assertion there.
            LoweringError: the network has no pixel program, with ``method="cached"``; it sees what it predicts; or the
                program computes something else than the network.
            KeyboardInterrupt: nothing is left behind.
        """
        shape = tuple(shape)
        conditions = inputs.bind("sample", self.network, context)
        images, uniforms, given = self._checked(n, shape, method, temperature, prefix, uniforms, generator, conditions)
        if not n:
            return images
        if method != "naive":
            try:
                self._run(images, uniforms, given, conditions, temperature, progress, None)
                return images
            except (LoweringError, _backend.BackendError) as error:
                if method == "cached" or isinstance(error, (NotCausalError, checks.SelfCheckError)):
                    raise
                with inputs.probing(self.network, self._device()):  # whose own errors come before the warning
                    rows = slice(0, 1 if isinstance(self.network, nn.Module) else n)
                    out = self._called("sample", images[rows], conditions.rows(rows))
                    head_channels("sample", out, images[rows], self.levels, self.head)
                self._warn(str(error))
        order = self._order("sample", shape, conditions)
        with evaluating(*self._modules()):
            return naive_sample(
                lambda x: self._called("sample", x, conditions),
                images,
                uniforms,
                given,
                levels=self.levels,
                head=self.head,
                temperature=temperature,
                progress=progress,
                group_order=order,
            )

    def _warn(self, reason: str) -> None:
        """Says once why the standard loop runs."""
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                "sample: the standard loop runs, a forward pass a pixel, since the network has no pixel program: "
                f"{reason} (method='naive' asks for the loop, method='cached' makes this an error)",
                stacklevel=4,
            )

    @torch.no_grad()
    def teacher_forced(self, images: Tensor, *, context: Context = None) -> Tensor:
        """What each pixel of ``images`` (N, C, H, W) would be drawn from, by the cached engine: the network's
        output."""
        shape = tuple(images.shape[1:])
        conditions = inputs.bind("teacher_forced", self.network, context)
        conditions.check_rows("teacher_forced", len(images))
        images = images.to(self._device(), torch.int64).contiguous()
        prepared = self._program(shape, conditions)
        self._prove(prepared, shape, conditions)
        out = self._forced(prepared.lowered, images, conditions)
        return out if not images.is_cuda else out.masked_fill(~self._unchanged(prepared), float("nan"))

    def _recorded(self, lowered: Lowered, images: Tensor, conditions: Conditions) -> Tensor:
        """(N, H, W, numbers) what a program records for given images."""
        program, shape = lowered.program, images.shape[1:]
        images = images.to(self._device(), torch.int64, copy=True)
        size = (len(images), program.height, program.width, program.record)
        record = torch.zeros(size, device=images.device, dtype=torch.float32)
        uniforms = torch.zeros(len(images), program.uniforms, *shape[1:], device=images.device, dtype=torch.float32)
        self._execute(lowered, images, uniforms, shape[1], conditions, 1.0, False, record)
        return record

    def _forced(self, lowered: Lowered, images: Tensor, conditions: Conditions) -> Tensor:
        """What a program computes for given images, as the network gives it."""
        shape = images.shape[1:]
        out = self._recorded(lowered, images, conditions).movedim(-1, 1)
        if self.head == "categorical" and not lowered.blocked:  # recorded colour by colour
            out = out.unflatten(1, (shape[0], self.levels)).transpose(1, 2).flatten(1, 2)
        return out.reshape(len(images), lowered.program.record, *shape[1:])

    def _unchanged(self, prepared: _Prepared) -> Tensor:
        """bool (): whether the GPU's weights are still those that were packed; nothing waits for it."""
        return prepared.contents.unchanged(state(self._lowerable())[1])

    def _checked(
        self,
        n: int,
        shape: tuple[int, ...],
        method: str,
        temperature: float,
        prefix: Tensor | None,
        uniforms: Tensor | None,
        generator: torch.Generator | None,
        conditions: Conditions,
    ) -> tuple[Tensor, Tensor, int]:
        if method not in METHODS:
            raise ValueError(f"sample: method={method!r}, expected one of {', '.join(map(repr, METHODS))}")
        if n < 0:
            raise ValueError(f"sample: n={n}, expected at least 0")
        if len(shape) not in (2, 3, 4) or min(shape) < 1:
            raise ValueError(f"sample: shape={shape}, expected (C, H, W), (C, L) or (C, T, H, W)")
        if not temperature > 0:
            raise ValueError(f"sample: temperature={temperature}, expected above 0")
        conditions.check_rows("sample", n)
        wanted, device = (n, self.uniforms_per_pixel(shape[0]), *shape[1:]), self._device()
        if uniforms is None:
            place = device if generator is None else generator.device
            uniforms = torch.rand(wanted, generator=generator, device=place, dtype=torch.float32)
        elif tuple(uniforms.shape) != wanted:
            raise ValueError(f"sample: uniforms have shape {tuple(uniforms.shape)}, expected {wanted}")
        elif not uniforms.is_cuda and uniforms.numel() and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
            raise ValueError("sample: uniforms hold values outside [0, 1)")
        # What lies between the last float32 below 1 and 1 may not become 1.
        uniforms = uniforms.to(device, torch.float32).clamp(max=1 - 2**-24).contiguous()
        images = torch.zeros((n, *shape), dtype=torch.int64, device=device)
        if prefix is None:
            return images, uniforms, 0
        if prefix.is_floating_point():
            raise TypeError(f"sample: prefix has dtype {prefix.dtype}, expected whole numbers")
        fits = prefix.dim() == len(shape) + 1 and prefix.shape[0] in (1, n) and prefix.shape[1] == shape[0]
        if not fits or prefix.shape[3:] != shape[2:] or prefix.shape[2] > shape[1]:
            rest = "".join(f", {s}" for s in shape[2:])
            raise ValueError(
                f"sample: prefix has shape {tuple(prefix.shape)}, expected ({n} or 1, {shape[0]}, at most "
                f"{shape[1]}{rest})"
            )
        if prefix.is_cuda:
            torch._assert_async(
                ((prefix >= 0) & (prefix < self.levels)).all(),
                f"sample: prefix holds values beyond 0 to {self.levels - 1}",
            )
        elif prefix.numel() and (int(prefix.min()) < 0 or int(prefix.max()) >= self.levels):
            raise ValueError(
                f"sample: prefix holds values from {int(prefix.min())} to {int(prefix.max())}, expected 0 to "
                f"{self.levels - 1}"
            )
        images[:, :, : prefix.shape[2]] = prefix
        return images, uniforms, prefix.shape[2]

    def _run(
        self,
        images: Tensor,
        uniforms: Tensor,
        given: int,
        conditions: Conditions,
        temperature: float,
        progress: bool,
        record: Tensor | None,
    ) -> None:
        shape = tuple(images.shape[1:])
        prepared = self._program(shape, conditions)
        self._prove(prepared, shape, conditions)
        self._execute(prepared.lowered, images, uniforms, given, conditions, temperature, progress, record)
        if images.is_cuda:
            images.masked_fill_(~self._unchanged(prepared), -1)

    def _execute(
        self,
        lowered: Lowered,
        images: Tensor,
        uniforms: Tensor,
        given: int,
        conditions: Conditions,
        temperature: float,
        progress: bool,
        record: Tensor | None,
    ) -> None:
        if _CPU is None and not images.is_cuda:
            raise _backend.BackendError(f"genfast::pixel_program: {_backend.extension('_cpu')[1]}")
        program = lowered.program
        with evaluating(*self._modules()):
            statics = lowered.statics(conditions)
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
                cache = _allocator.empty_strided((count * program.image_floats + 64,), (1,), torch.float32).zero_()
                maps = torch.tensor([_map(m, start) for m in statics], dtype=torch.int64)
                faults = array("q", bytes(8 * count))
                row, rows = 0, max(1, height // 64)
                while row < height:
                    _CPU.pixel_program(
                        program=program.code,
                        weights=program.weights,
                        statics=maps,
                        cache=cache,
                        images=images[part],
                        uniforms=uniforms[part],
                        record=None if record is None else record[part],
                        faults=faults.buffer_info()[0],
                        record_size=program.record,
                        n=count,
                        group=GROUP,
                        first_row=row,
                        last_row=min(row + rows, height),
                        given=given,
                        period=program.period,
                        active=program.active,
                        temperature=temperature,
                        threads=threads,
                    )
                    _check_faults(faults, program, images.shape[2:], start, self.head)
                    advance(min(rows, height - row))
                    row += rows


def _check_faults(faults: Sequence[int], program: Program, spatial: Sequence[int], first: int, head: str) -> None:
    """Raises where an image, of those from ``first`` on, has one plus the first place at which nothing could be
    drawn."""
    if not any(faults):
        return
    image = next(i for i, fault in enumerate(faults) if fault)
    place = faults[image] - 1
    colour, place = place % program.channels, place // program.channels
    position: list[int] = []
    for size in reversed(spatial):
        position.insert(0, place % size)
        place //= size
    raise not_drawable("sample", head, first + image, colour, position)


def _map(values: Tensor, first: int) -> list[int]:
    """A condition (N or 1, rows or 1, columns or 1, channels) from image ``first`` on: its address and its three
    strides."""
    steps = [s if size > 1 else 0 for s, size in zip(values.stride(), values.shape[:3])]
    return [values.data_ptr() + 4 * first * steps[0], *steps]


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Whole numbers on a GPU, which get there as arguments of a launch: a graph captures no copy from pageable
    memory."""
    found = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    if numbers:
        torch._foreach_add_(list(found.unbind()), numbers)
    return found


def _to_gpu(program: Program, device: torch.device) -> None:
    """Moves what csrc/cuda/pixel_program.cu reads, which counts in 32 bits."""
    largest = max(program.weights.numel(), program.image_floats)
    if largest >= 2**31:
        raise LoweringError(
            f"the program has {largest} weights or values of an image, the GPU's engine takes less than 2^31"
        )
    program.code, program.weights = program.code.to(device, torch.int32), program.weights.to(device)


def _run_on_gpu(
    program: Program,
    statics: list[Tensor],
    images: Tensor,
    uniforms: Tensor,
    given: int,
    temperature: float,
    progress: bool,
    record: Tensor | None,
) -> None:
    """One launch for some rows of as many images as fit, on the current stream; waits for none unless progress is
    shown.

    Where nothing can be drawn, the kernel prints the place, and an assertion fails when the GPU gets there, as
    PyTorch's own
    do for indices: to raise here would wait for it."""
    if program.frames > 1:
        raise _backend.BackendError(
            "genfast::pixel_program: the GPU engine takes no videos; move the network to the CPU"
        )
    if _CUDA is None:
        raise _backend.BackendError(f"genfast::pixel_program: {_backend.extension('_cuda')[1]}")
    wave, rows = max(1, GPU_WAVE // (4 * max(1, program.image_floats))), max(1, program.height // 64)
    starts = range(0, len(images), wave)
    with _bar(progress, len(starts) * program.height) as advance, torch.cuda.device(images.device):
        stream = torch.cuda.current_stream()
        for start in starts:
            part = slice(start, start + wave)
            count = len(images[part])
            cache = torch.zeros(count * program.image_floats, dtype=torch.float32, device=images.device)
            faults = torch.zeros(count, dtype=torch.int64, device=images.device)
            scratch = torch.empty(count, program.levels, dtype=torch.float64, device=images.device)
            maps = _on_device([number for m in statics for number in _map(m, start)], images.device)
            for row in range(0, program.height, rows):
                last = min(row + rows, program.height)
                _CUDA.pixel_program(
                    stream=stream.cuda_stream,
                    program=program.code,
                    weights=program.weights,
                    statics=maps,
                    cache=cache,
                    images=images[part],
                    uniforms=uniforms[part],
                    record=None if record is None else record[part],
                    scratch=scratch,
                    faults=faults,
                    code=program.code.numel(),
                    weight_floats=program.weights.numel(),
                    image_floats=program.image_floats,
                    record_size=program.record,
                    n=count,
                    first_row=row,
                    last_row=last,
                    given=given,
                    temperature=temperature,
                )
                if progress:
                    stream.synchronize()
                advance(last - row)
            torch._assert_async(
                (faults == 0).all(), "sample: the network's logits or mixture parameters are not finite"
            )


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
