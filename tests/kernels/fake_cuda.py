"""A CUDA GPU that computes nothing: the launchers of every kernel run on fake CUDA tensors, with no GPU and no driver.

What runs for real is all that Python does between a call and a launch: checks, layouts, plans, allocations, PyTorch's
own operations (by shape alone) and the launches themselves, which are recorded and checked. Host tensors keep their
values, so tables are built as they would be. Reported as problems: whatever waits for the device or reads from it, a
copy from host memory in a call that has been made before, an address that is of no live tensor, a launch on another
device or stream than its tensors', a grid or an argument that CUDA does not take.

    python -m tests.kernels.fake_cuda             checks every op and layer, prints what is wrong
    python -m tests.kernels.fake_cuda --compile   also compiles, for sm_90, each specialisation that was launched
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import ctypes
import functools
import importlib
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from genfast._registry import OPS
from genfast._torch_private import autograd_works
from genfast.nn import reversible

ROOT = Path(__file__).resolve().parents[2]
AIR = 1 << 44  # where fake addresses begin: no size and no host address is that large and a multiple of 256
META, CUDA = 14, 1  # of c10::DeviceType
GRID = (2**31 - 1, 65535, 65535)
aten = torch.ops.aten


class Problem(NamedTuple):
    """What a GPU, or a capture, would have met."""

    call: str
    what: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.call}: {self.what}" + (f" ({self.where})" if self.where else "")


class Launch(NamedTuple):
    """A Triton launch, specialised as Triton would."""

    kernel: Any
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[Any, Any], ...]
    attributes: tuple[tuple[Any, Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def specialisation(self) -> Launch:
        return self._replace(grid=())


def _site() -> str:
    """The innermost line of this project that led here."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename).absolute()
        if path.is_relative_to(ROOT) and path != Path(__file__).absolute():
            return f"{path.relative_to(ROOT)}:{frame.lineno}: {frame.line}"
    return ""


# ---- PyTorch's side: operations by shape alone ----


_COMPOSITE = {"reversible": reversible._forward, "reversible_backward": reversible._backward_kernel}


class _Mode(TorchDispatchMode):
    """Host tensors are real, CUDA tensors are fake."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.values: Any = WeakIdKeyDictionary()
        self.pinned: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # three calls of four
            return args[0].fake_device
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        fakes = [t for t in tensors if isinstance(t, FakeTensor)]
        device = kwargs.get("device")
        device = None if device is None else torch.device(device)
        # The borrowed guard calls the current device "meta".
        if device is not None and (device.type == "cuda" or device.type == "meta" and func is aten._to_copy.default):
            device = torch.device("cuda", self.gpu._current if device.type == "meta" else self.gpu._index(device))
            kwargs = {**kwargs, "device": device}
        if not fakes and (device is None or device.type != "cuda"):
            pinned = kwargs.pop("pin_memory", None)
            result = func(*args, **kwargs)
            if pinned:
                self.pinned[result] = True
            return result
        if func.namespace == "genfast" and fakes:  # as the dispatcher would for real tensors
            with self:
                if func._opname not in _COMPOSITE:
                    return OPS[func._opname]._entry("cuda")(*args)
                with autograd_works():
                    return _COMPOSITE[func._opname](*args)
        values = self._values(func, tensors, args, kwargs)
        if fakes:
            answer = self._watch(func, args, device, tensors, fakes)
            if answer is not None:
                return answer if values is None else values.item() if not isinstance(answer, Tensor) else values
        elif tensors and tensors[0].numel() and func is aten._to_copy.default:
            self.gpu.copied("host to device")
        with self.fake:
            args, kwargs = tree_map_only(Tensor, self._converted, (args, kwargs))
            result = func(*args, **kwargs)
        assert all(isinstance(t, FakeTensor) for t in tree_leaves(result) if isinstance(t, Tensor)), func
        for t, value in zip(tree_leaves(result), tree_leaves(values)):
            if isinstance(t, Tensor) and value is not None:
                self.values[t] = value
        return result

    def _converted(self, t: Tensor) -> Tensor:
        return t if isinstance(t, FakeTensor) else self.fake.from_tensor(t)

    def _values(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        """What whole numbers that came from the host have become: what is built of tables depends on what is in
        them."""
        if func._schema.is_mutable:
            for t in tensors:
                self.values.pop(t, None)
            return None
        if not tensors or any(
            t.is_floating_point() or isinstance(t, FakeTensor) and t not in self.values for t in tensors
        ):
            return None
        args, kwargs = tree_map_only(FakeTensor, self.values.__getitem__, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        found = func(*args, **kwargs)
        return torch.tensor(found) if isinstance(found, (bool, int)) else found

    def tolist(self, t: Tensor) -> Any:
        self.gpu.problem("waits for the device: tolist")
        return self.values[t].tolist() if t in self.values else torch.ones(t.shape, dtype=t.dtype).tolist()

    def _watch(
        self, func: Any, args: Any, device: torch.device | None, tensors: list[Tensor], fakes: list[Tensor]
    ) -> Any:
        name = func.overloadpacket
        if name is aten._local_scalar_dense:
            self.gpu.problem("waits for the device: a tensor's value is read")
            return True if fakes[0].dtype is torch.bool else 1.0 if fakes[0].is_floating_point() else 1
        if name in (aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount):
            self.gpu.problem(f"waits for the device: {func}")
            if name is aten.equal:
                return True
        if name is aten._to_copy and device is not None and device.type == "cpu":
            self.gpu.problem("waits for the device: a copy to the host")
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if name is aten.copy_ and any(t in self.pinned for t in args[:2]) and (len(args) > 2 and args[2]):
            return args[0]
        if name is aten.copy_ and len(fakes) == 1 and args[0].numel():
            self.gpu.copied("host to device") if args[0] is fakes[0] else self.gpu.problem(
                "waits for the device: copy_"
            )
        if name in (aten.index, aten.index_put, aten.index_put_) and any(t is not None and t.is_cpu for t in args[1]):
            self.gpu.copied("host to device: indices")
        return None


def _run_backward(
    outputs: Sequence[Any],
    grads: Sequence[Tensor | None],
    keep: Any,
    create_graph: bool,
    inputs: Sequence[Tensor],
    allow_unused: bool = False,
    accumulate_grad: bool = False,
) -> Any:
    """Reverse mode in Python: PyTorch's own engine asks the driver for streams. Takes what the engine's entry takes."""
    found: dict[Any, dict[int, Tensor]] = {}
    edges = [_edge(t) for t in inputs]
    waiting: dict[Any, int] = {}
    seen = {_edge(o)[0] for o in outputs}
    stack = list(seen)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] = waiting.get(node, 0) + 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)

    def give(node: Any, place: int, grad: Tensor | None) -> None:
        if grad is not None:
            meta = node._input_metadata[place]
            grad = grad if grad.shape == meta.shape else grad.sum_to_size(meta.shape)
            grad = grad if grad.dtype == meta.dtype else grad.to(meta.dtype)
            at = found.setdefault(node, {})
            at[place] = at[place] + grad if place in at else grad

    # Which nodes lead to an input: the others are not run, as in the engine.
    leads: dict[Any, bool] = {}
    wanted = {node for node, _ in edges}

    def order() -> list[Any]:
        counts, ready, sequence = dict(waiting), [n for n in seen if not waiting.get(n)], []
        while ready:
            node = ready.pop()
            sequence.append(node)
            for following, _ in node.next_functions:
                if following is not None:
                    counts[following] -= 1
                    if not counts[following]:
                        ready.append(following)
        return sequence

    sequence = order()
    for node in reversed(sequence):
        accumulates = not inputs and hasattr(node, "variable")
        leads[node] = node in wanted or accumulates or any(n is not None and leads[n] for n, _ in node.next_functions)
    with torch.set_grad_enabled(create_graph):
        for o, g in zip(outputs, grads):
            give(*_edge(o), torch.ones_like(o) if g is None else g)
        for node in sequence:
            given = found.get(node)
            if not given or not leads[node]:
                continue
            if hasattr(node, "variable"):
                if not inputs or accumulate_grad:
                    leaf = node.variable
                    leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]
                continue
            if not any(n is not None and leads[n] for n, _ in node.next_functions):
                continue
            width = len(node._input_metadata)
            results, following = _apply(node, [given.get(i) for i in range(width)]), node.next_functions
            if isinstance(
                node, torch.autograd.function.BackwardCFunction
            ):  # has an edge for each tensor, not each argument
                results = tuple(r for r, needed in zip(results, node.needs_input_grad) if needed)
                following = [edge for edge in following if edge[0] is not None]
            for (after, place), grad in zip(following, results):
                if after is not None and leads[after]:
                    give(after, place, grad)
    if accumulate_grad:
        return ()
    answer = tuple(found.get(node, {}).get(place) for node, place in edges)
    if not allow_unused and any(a is None for a in answer):
        raise RuntimeError("One of the differentiated Tensors appears to not have been used in the graph.")
    return answer


def _set_materialize_grads(ctx: Any, value: bool) -> None:
    ctx.materialize_grads = ctx.fills = value  # the first cannot be read


def _edge(t: Any) -> tuple[Any, int]:
    edge = t if isinstance(t, torch.autograd.graph.GradientEdge) else torch.autograd.graph.get_gradient_edge(t)
    return edge.node, edge.output_nr


def _apply(node: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        if getattr(node, "fills", True):
            grads = [
                torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g
                for g, m in zip(grads, node._input_metadata)
            ]
        result = node.apply(*grads)
    else:
        result = node(*grads)
    return result if isinstance(result, tuple) else (result,)


# ---- CUDA's side ----


class _Stream(NamedTuple):
    device: torch.device
    cuda_stream: int

    def wait_stream(self, stream: Any) -> None:
        """Nothing runs, so nothing is waited for."""


class _Event:
    def record(self, stream: Any = None) -> None:
        """Nothing runs, so all has been done."""

    def query(self) -> bool:
        return True


class _Graph:
    def replay(self) -> None:
        """Nothing runs."""


class _Properties:
    name = "NVIDIA H200 (fake)"
    major, minor = 9, 0
    multi_processor_count = 132
    shared_memory_per_block = 48 * 1024
    shared_memory_per_block_optin = 227 * 1024
    total_memory = 139 << 30
    L2_cache_size = 50 << 20
    warp_size = 32


class _Pointer:
    """What Triton looks at in a tensor."""

    def __init__(self, t: Tensor) -> None:
        self.dtype, self._address = t.dtype, t.data_ptr()

    def data_ptr(self) -> int:
        return self._address


_TAKES = {
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "address": (Tensor, int, type(None)),
    "float[]": (list, tuple),
}


class _Module:
    """genfast._cuda with its launches recorded instead of run."""

    def __init__(self, gpu: FakeCuda, module: Any) -> None:
        self.gpu, self.module = gpu, module

    def degree_ordered_scratch(self, n: int, rows: int) -> int:
        return n * rows  # the engine's answer depends on the device; this one makes the tensor

    def __getattr__(self, name: str) -> Callable[..., None]:
        fields = getattr(self.module, name).fields

        def launch(**values: Any) -> None:
            self.gpu.engine(name, fields, values)

        return launch


class FakeCuda:
    """Inside ``with``, ``device="cuda"`` is a GPU that computes nothing; ``problems`` and ``launches`` fill up.

    ``devices`` GPUs are there, "cuda:0" is the current one.
    """

    def __init__(self, devices: int = 2) -> None:
        self.devices = devices
        self.problems: list[Problem] = []
        self.launches: list[Launch] = []
        self.engines: list[str] = []
        self.call = ""
        self.capturing = self.asked = False  # asked: whether anything is done otherwise in a capture
        self.settled = False  # whether what runs has run before
        self._current = 0
        self._streams = {i: _Stream(torch.device("cuda", i), AIR // 2 + 64 * i) for i in range(devices)}
        self._next = AIR
        self._known: dict[int, tuple[int, StorageWeakRef, int, int]] = {}
        self._bases: list[int] = []
        self._all: list[tuple[int, StorageWeakRef, int, int]] = []

    # ---- what is found ----

    def problem(self, what: str) -> None:
        found = Problem(self.call, what, _site())
        if found not in self.problems and (self.settled or not what.startswith("waits")):
            self.problems.append(found)

    def copied(self, what: str) -> None:
        """A copy from pageable memory waits, and a capture refuses it; tables of a first call are made once."""
        if self.settled:
            self.problem(f"copies {what} in each call")

    def failed(self, call: str, error: Exception) -> None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(ROOT)]
        where = (
            f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
        )
        said = str(error).splitlines()[0] if str(error) else ""
        self.problems.append(Problem(call, f"{type(error).__name__}: {said}", where))

    # ---- addresses ----

    def address(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is None or known[1].expired():
            known = (self._next, StorageWeakRef(storage), size, t.get_device())
            self._next += -(-(size + 1) // 256) * 256
            self._known[key] = known
            self._bases.append(known[0])
            self._all.append(known)
        if not size:
            return 0
        return known[0] + t.storage_offset() * t.element_size()

    def _check_address(self, of: str, address: int) -> None:
        place = bisect.bisect(self._bases, address) - 1
        base, storage, size, device = self._all[max(0, place)] if self._all else (0, None, 0, 0)
        if place < 0 or storage is None or address >= base + size:
            self.problem(f"{of} is handed an address that is of no tensor")
        elif storage.expired():
            self.problem(f"{of} is handed the address of a tensor that is gone")
        elif device != self._current:
            self.problem(f"{of} is launched on cuda:{self._current}, its tensors are on cuda:{device}")

    # ---- launches ----

    def engine(self, name: str, fields: dict[str, str], values: dict[str, Any]) -> None:
        self.engines.append(name)
        if fields.keys() != values.keys():
            self.problem(f"_cuda.{name}: fields {sorted(fields.keys() ^ values.keys())} are missing or not its own")
        for field, value in values.items():
            if field in fields and not isinstance(value, _TAKES[fields[field]]):
                self.problem(f"_cuda.{name}: {field} is {type(value).__name__}, expected {fields[field]}")
        if values.get("stream") != self.current_stream().cuda_stream:
            self.problem(f"_cuda.{name} is launched on another stream than the current one")
        for field, value in values.items():
            if fields.get(field) == "address" and field != "stream" and value is not None:
                address = value.data_ptr() if isinstance(value, Tensor) else value
                if address:  # null is no tensor
                    self._check_address(f"_cuda.{name}", address)

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        from triton.runtime.jit import create_function_from_signature

        backend, binders = _compiler()
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        name = f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__}"
        pointers = [_Pointer(a) if isinstance(a, Tensor) else a for a in args]
        bound, specialization, options = binders[kernel](*pointers, debug=False, instrumentation_mode="", **kwargs)
        named = dict(zip(kernel.arg_names, args))
        grid = tuple(grid(bound) if callable(grid) else grid)
        if any(not isinstance(g, int) for g in grid):
            self.problem(f"{name}: grid {grid} is not of integers")
        tensors = {argument: t for argument, t in named.items() if isinstance(t, Tensor)}
        if any(g > most for g, most in zip(grid, GRID)):
            self.problem(f"{name}: grid {grid}, CUDA takes at most {GRID}")
        if min(grid) < 1 and all(t.numel() for t in tensors.values()):
            self.problem(f"{name}: grid {grid} launches nothing")
        for argument, t in tensors.items():
            if not t.is_cuda:
                self.problem(f"{name}: {argument} is on {t.device}")
            elif t.get_device() != self._current:
                self.problem(f"{name} is launched on cuda:{self._current}, {argument} is on {t.device}")
        options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
        self.launches.append(
            Launch(
                kernel,
                grid,
                tuple(signature.items()),
                tuple(constants.items()),
                tuple((k, tuple(map(tuple, v))) for k, v in attributes.items()),
                tuple((k, getattr(options, k)) for k in ("num_warps", "num_stages", "maxnreg")),
            )
        )

    # ---- torch.cuda ----

    def current_stream(self, device: Any = None) -> _Stream:
        return self._streams[self._current if device is None else self._index(device)]

    def _index(self, device: Any) -> int:
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self._current if index is None else index

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self._current = self._current, self._index(device)
        try:
            yield
        finally:
            self._current = before

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        device = stream.device.index
        before, self._streams[device] = self._streams[device], stream
        try:
            yield
        finally:
            self._streams[device] = before

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        before, self.settled, self.capturing = (self.settled, self.capturing), True, True
        try:
            with self.stream(self.new_stream()):
                yield
        finally:
            self.settled, self.capturing = before

    def _set_sync_debug_mode(self, mode: str) -> None:
        self.settled = mode == "error"

    def new_stream(self, device: Any = None) -> _Stream:
        self._next += 256
        return _Stream(
            torch.device("cuda", self._current if device is None else self._index(device)), AIR // 2 + self._next
        )

    def _property(self, _: Any = None) -> type[_Properties]:
        return _Properties

    def _is_capturing(self) -> bool:
        self.asked = True
        return self.capturing

    def _wait(self, *_: Any) -> None:
        self.problem("waits for the device: torch.cuda.synchronize")

    # ---- in and out ----

    def __enter__(self) -> FakeCuda:
        from triton.runtime.jit import JITFunction

        from genfast import _registry

        if torch.cuda.is_available():
            torch.cuda.init()  # which PyTorch would believe done once it has met a fake tensor
        gpu, stack = self, contextlib.ExitStack()
        self._stack = stack
        _forget()
        stack.callback(_forget)
        table = _guards()
        stack.callback(table.__setitem__, CUDA, table[CUDA])
        table[CUDA] = table[META]
        lift = torch._C._only_lift_cpu_tensors()
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift)
        torch._C._set_only_lift_cpu_tensors(True)

        def patch(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        patch(FakeTensor, "data_ptr", lambda t: gpu.address(t))
        patch(fake_tensor, "init_gpu_context", lambda *_: None)  # which would allocate, were there a GPU
        patch(torch.autograd, "_engine_run_backward", _run_backward)
        patch(torch.autograd.function.FunctionCtx, "set_materialize_grads", _set_materialize_grads)
        patch(JITFunction, "run", lambda kernel, *args, **kwargs: gpu.launch(kernel, *args, **kwargs))
        patch(_registry, "dispatch_modes", lambda: 0)
        patch(_registry, "_PLAIN", (*_registry._PLAIN, FakeTensor))
        signatures = {
            id(op.signature): _registry.Signature(op.kinds, op._taken("cpu"), op._taken("cuda")) for op in OPS.values()
        }
        patch(_registry, "_guard", lambda s, args: _registry._guard_in_python(signatures[id(s)], args))
        for name, value in {
            "device": self.device, "stream": self.stream, "Stream": self.new_stream, "Event": _Event,
            "current_stream": self.current_stream, "current_device": lambda: gpu._current,
            "device_count": lambda: gpu.devices,
            "is_available": lambda: True, "is_initialized": lambda: False, "synchronize": self._wait,
            "get_device_properties": self._property, "get_device_capability": lambda *_: (9, 0),
            "get_device_name": lambda *_: _Properties.name, "is_current_stream_capturing": self._is_capturing,
            "_lazy_init": lambda: None, "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *_: None, "graph": self.graph, "CUDAGraph": _Graph,
            "manual_seed": lambda seed: None,
            "set_sync_debug_mode": self._set_sync_debug_mode, "_sleep": lambda cycles: None,
            "mem_get_info": lambda: (_Properties.total_memory, _Properties.total_memory), "memory_reserved": lambda: 0,
        }.items():  # fmt: skip
            patch(torch.cuda, name, value)
        for name in ("ops.pixel_rnn", "ops._autoregressive_inverse_cuda", "ops.invertible_conv1x1", "sampling.sampler"):
            module = importlib.import_module(f"genfast.{name}")
            if module._CUDA is not None:
                patch(module, "_CUDA", _Module(self, module._CUDA))
        mode = _Mode(self)
        patch(FakeTensor, "tolist", lambda t: mode.tolist(t))
        # Checks that pass over a tracer's tensors are made.
        for name in ("ops.discretized_logistic_mixture", "ops.autoregressive_inverse", "programs.degree_program"):
            module = importlib.import_module(f"genfast.{name}")
            stack.enter_context(mock.patch.object(module, "type", _plain_type, create=True))
        stack.enter_context(mode)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()


def _plain_type(value: Any) -> type:
    return Tensor if isinstance(value, FakeTensor) else type(value)


@functools.cache
def _guards() -> Any:
    """PyTorch's table of device guards: autograd notes the stream of each tensor, and a build for the CPU has none for
    CUDA."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    return (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")


@functools.cache
def _compiler() -> tuple[Any, dict[Any, Any]]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    return make_backend(GPUTarget("cuda", 90, 32)), {}


def _forget() -> None:
    """Empties the caches of plans, which may hold fake tensors, or real ones of a GPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("genfast."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear") and getattr(value, "__module__", "") == name:
                    value.cache_clear()


# ---- what is run ----


def on_gpu(a: Any, dtype: torch.dtype, differentiated: bool, device: str = "cuda") -> Any:
    """An argument of a sample as a fresh fake tensor, host tables as they are."""
    if isinstance(a, list):
        return [on_gpu(element, dtype, differentiated, device) for element in a]
    if not isinstance(a, Tensor):
        return a
    a = a.to(dtype) if a.is_floating_point() else a
    return a.detach().to(device).requires_grad_(differentiated and a.is_floating_point())


def repeated(gpu: FakeCuda, call: str, function: Callable[[], Any], once: bool = False) -> None:
    """``function`` at first, when it is to have all its tables, and within a capture; ``once``: as at first."""
    gpu.call, gpu.asked = call, False
    try:
        function()
        if not once:
            if call.startswith("critic_step"):
                function()  # a critic's second call compares joined with separate outputs, once
            gpu.settled = True
            function()
        if not once and gpu.asked:
            gpu.capturing = True
            function()
    except Exception as error:
        gpu.failed(call, error)
    finally:
        gpu.settled = gpu.capturing = False


def check_sample(
    gpu: FakeCuda, op: Any, sample: Any, dtype: torch.dtype, backend: str, device: str = "cuda", once: bool = False
) -> None:
    """One op on one sample, forward and backward through the registry."""
    import genfast

    kept = [on_gpu(a, dtype, False, device) for a in sample.args]

    def fresh(a: Any, differentiated: bool) -> Any:
        if isinstance(a, list):
            return [fresh(element, differentiated) for element in a]
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        return a.detach().clone().requires_grad_(differentiated)

    def run() -> None:
        args = [fresh(a, i not in sample.constant) for i, a in enumerate(kept)]
        with genfast.backend(backend):
            result = op(*args)
            backward(result, args)

    repeated(gpu, f"{op.name} [{sample.label}] {str(dtype)[6:]} {backend} {device}", run, once)


def backward(result: Any, args: Any) -> None:
    """The gradients of all that ``args`` hold by all that came out."""
    outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]
    if outputs and inputs:
        grads = torch.autograd.grad(outputs, inputs, [torch.empty_like(o) for o in outputs], allow_unused=True)
        for t, g in zip(inputs, grads):
            if g is not None and (g.shape != t.shape or g.dtype != t.dtype or g.device != t.device):
                raise AssertionError(
                    f"a gradient is {g.dtype} {tuple(g.shape)} on {g.device}, of {t.dtype} {tuple(t.shape)}"
                )


def check_ops(gpu: FakeCuda, progress: Callable[[str], None] | None = None, every: bool = False) -> None:
    """Every op with samples, on every backend that serves CUDA tensors; one sample in bfloat16, or with ``every`` all
    of them in every dtype; and one on a device that is not current."""
    for op in OPS.values():
        if op.samples is None:
            continue
        if progress is not None:
            progress(op.name)
        for number, sample in enumerate(op.samples(torch.Generator().manual_seed(0))):
            for backend in ("triton", "cuda"):
                if backend not in op.kernels:
                    continue
                check_sample(gpu, op, sample, torch.float32, backend)
                for dtype in op.dtypes[backend][1:] if every else op.dtypes[backend][1:2] if not number else ():
                    check_sample(gpu, op, sample, dtype, backend, once=True)
                if not number or every:
                    check_sample(gpu, op, sample, torch.float32, backend, "cuda:1", once=True)


def check_cases(gpu: FakeCuda, progress: Callable[[str], None] | None = None) -> None:
    """Layers, functions and whole steps of training and sampling, as they are called."""
    from .capture_cases import CASES

    for name, build in CASES.items():
        if progress is not None:
            progress(name)
        torch.manual_seed(0)
        gpu.call = name
        try:
            case = build("cuda")
        except Exception as error:
            gpu.failed(name, error)
            continue
        repeated(gpu, name, lambda case=case: case.run(*(t.clone() for t in case.inputs)))


def run_all(progress: Callable[[str], None] | None = None, every: bool = False) -> FakeCuda:
    """Everything, with what was found and launched."""
    with FakeCuda() as gpu:
        check_ops(gpu, progress, every)
        check_cases(gpu, progress)
    return gpu


def check_all(progress: Callable[[str], None] | None = None) -> list[Problem]:
    """Everything; ``progress`` is told the name of what is checked next."""
    return run_all(progress).problems


def specialisations(launches: Sequence[Launch]) -> list[Launch]:
    """Each once."""
    return list(dict.fromkeys(launch.specialisation for launch in launches))


def compile_one(launch: Launch) -> str:
    """Compiles for sm_90; the error, if any."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {k: [list(pair) for pair in v] for k, v in launch.attributes}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(launch.options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.fake_cuda")
    parser.add_argument("--compile", action="store_true", help="compile each specialisation for sm_90")
    parser.add_argument("--every", action="store_true", help="every sample in every dtype, also on the second GPU")
    arguments = parser.parse_args()
    gpu = run_all(lambda name: print(name, file=sys.stderr), every=arguments.every)
    for problem in gpu.problems:
        print(problem)
    found = specialisations(gpu.launches)
    print(
        f"{len(gpu.launches)} Triton launches of {len(found)} specialisations, {len(gpu.engines)} of CUDA C++, "
        f"{len(gpu.problems)} problems"
    )
    failed = len(gpu.problems)
    if arguments.compile:
        for launch, number in zip(found, itertools.count(1)):
            error = compile_one(launch)
            failed += bool(error)
            print(
                f"{number}/{len(found)} {launch.kernel.fn.__module__}.{launch.kernel.fn.__name__} {error}", flush=True
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
