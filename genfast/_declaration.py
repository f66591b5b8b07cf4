"""What an op's declaration says in words, as functions: what its outputs look like, what is saved and what the backward
gets.

An output is described by one of

- ``"like x"``: x's shape and dtype, in x's memory order (channels_last stays channels_last);
- ``"contiguous like x"``: x's shape and dtype, contiguous;
- ``"like params in the order of x"``: the shape and dtype of ``params``, in x's memory order;
- ``"(N, C // 2, ...) like x"``: another shape in x's dtype. N, C and ``...`` are x's first, second and further sizes;
    any
  argument may be named (``"(N, features, weight.shape[0]) like x"``). Where the shape ends with ``...`` after two sizes
  it is laid out in x's order, else, and after ``contiguous``, it is contiguous;

then optionally ``as accumulator`` (float32 for half types, see :func:`genfast._tensors.accumulator`) or ``as`` a dtype
(``as int64``), and ``if`` with a condition on the arguments, without which the output is an empty vector.

The functions are compiled from source that names the op's own arguments, so that a call runs what one would write by
hand.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._tensors import accumulator, memory_format

_OUTPUT = re.compile(
    r"(?:\((?P<shape>.*)\) )?(?P<contiguous>contiguous )?like (?P<name>\w+)(?: in the order of (?P<order>\w+))?"
    r"(?: as (?P<dtype>\w+))?(?: if (?P<condition>.+))?"
)


@dataclass(frozen=True)
class Output:
    """The Python source of an output's shape and of its allocation, and what an error says of the shape."""

    shape: str
    allocation: str
    description: str
    may_be_empty: bool  # has a condition


def output(name: str, text: str, empty: str | None = None) -> Output:
    """What ``text`` says of the output ``name``; one that is left out is an empty vector like the tensor ``empty``."""
    match = _OUTPUT.fullmatch(text)
    if match is None:
        raise ValueError(f"declare: output {name!r} is {text!r}, expected '[(shape)] [contiguous] like ARGUMENT ...'")
    like, order, condition = match["name"], match["order"] or match["name"], match["condition"]
    shape, description = f"{like}.shape", f"that of {like}"
    dtype = "" if match["dtype"] is None else f"_torch.{match['dtype']}"
    if match["dtype"] == "accumulator":
        dtype = f"_accumulator({like}.dtype)"
    if match["shape"] is not None:
        sizes = [size.strip() for size in match["shape"].strip(" ,").split(",") if size.strip()]
        description = "one per sample" if sizes == ["N"] else f"that of {name}"
        axes = {"N": f"{like}.shape[0]", "C": f"{like}.shape[1]", "...": f"*{like}.shape[2:]"}
        shape = re.sub(r"\bN\b|\bC\b|\.\.\.", lambda axis: axes[axis[0]], f"({match['shape'].strip(' ,')},)")
        shape = "()" if not sizes else shape
    if match["contiguous"] or (match["shape"] is not None and sizes[2:] != ["..."]):
        allocation = f"{like}.new_empty({shape}{dtype and f', dtype={dtype}'})"
    elif match["shape"] is None:
        allocation = f"_torch.empty_like({like}, memory_format=_memory_format({order}){dtype and f', dtype={dtype}'})"
    else:
        allocation = (
            f"_torch.empty({shape}, dtype={dtype or f'{like}.dtype'}, device={like}.device, "
            f"memory_format=_memory_format({order}))"
        )
    if condition is not None:
        shape, allocation = (
            f"({shape} if {condition} else (0,))",
            f"({allocation} if {condition} else {empty or like}.new_empty(0{dtype and f', dtype={dtype}'}))",
        )
    return Output(shape, allocation, description, condition is not None)


def function(name: str, arguments: Sequence[str], body: Sequence[str], **names: Any) -> Callable[..., Any]:
    """The function ``name`` with these positional arguments and lines, which may use ``names`` beside its arguments."""
    source = "\n    ".join((f"def {name}({', '.join(arguments)}):", *body)) + "\n"
    file = f"<genfast {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # shown in tracebacks
    scope = {"_torch": torch, "_accumulator": accumulator, "_memory_format": memory_format, **names}
    exec(compile(source, file, "exec"), scope)  # noqa: S102
    made: Callable[..., Any] = scope[name]
    return made


def allocate(op: str, arguments: Sequence[str], outputs: Sequence[Output]) -> Callable[..., Any]:
    """A function of the op's arguments that gives uninitialised outputs; on fake tensors the op's fake
    implementation."""
    made = [o.allocation for o in outputs]
    return function(f"{op}_outputs", arguments, [f"return {made[0] if len(made) == 1 else ', '.join(made)}"])


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], why: str = "") -> None:
    """Raises where ``tensor``, the argument ``name`` of ``op``, has another shape than ``expected``."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}{' (' + why + ')' if why else ''}"
        )


class Schema:
    """A schema's arguments, as text by name: ``{"x": "Tensor x", "bias": "Tensor? bias", "eps": "float eps=1e-8"}``."""

    def __init__(self, text: str) -> None:
        inside = text[text.index("(") + 1 : text.rindex(")", 0, text.find("->") if "->" in text else None)]
        items = [item.strip() for item in inside.split(",") if item.strip()]
        self.arguments = {item.split("=")[0].split()[-1]: item for item in items}
        self.tensors = tuple(name for name, item in self.arguments.items() if item.startswith("Tensor"))
        self.optional = tuple(name for name, item in self.arguments.items() if item.startswith("Tensor?"))
        self.options = tuple(name for name in self.arguments if name not in self.tensors)

    def argument(self, name: str) -> str:
        return self.arguments[name]


def save_for_backward(
    op: str,
    schema: Schema,
    outputs: Sequence[str],
    saved: Mapping[str, str],
    options: Sequence[str],
    constant: Sequence[str],
) -> Callable[..., None]:
    """The ``setup_context`` of an op: saves ``saved`` (by name, expressions of arguments and outputs) and sets
    ``ctx.options``.

    A gradient that does not exist reaches the backward as None. Outputs in ``constant`` have no derivative.
    """
    used = " ".join(saved.values())
    reads_outputs = bool(constant) or any(
        re.search(rf"\b{name}\b", used) and name not in schema.arguments for name in outputs
    )
    body = [f"{', '.join(schema.arguments)}, = inputs", "ctx.set_materialize_grads(False)"]
    if reads_outputs:
        body.append(f"{', '.join(outputs)} = output")
    if options:
        body.append(f"ctx.options = ({', '.join(options)},)")
    if constant:
        body.append(f"ctx.mark_non_differentiable({', '.join(constant)})")
    if saved:
        body.append(f"ctx.save_for_backward({', '.join(saved.values())})")
    return function(f"{op}_setup_context", ("ctx", "inputs", "output"), body)


def gradients(
    op: str,
    schema: Schema,
    outputs: Sequence[Output],
    grads: Mapping[int, str],
    saved: Sequence[str],
    options: Sequence[str],
    call: Sequence[str],
    returned: Sequence[str],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """The derivative of an op: calls ``backward`` with ``call`` and returns its outputs as the gradients of
    ``returned``.

    ``grads`` are the names of the gradients by the output that they belong to. ``call`` names gradients, saved tensors
    and options; ``wanted`` is a flag for each of ``returned`` that says whether its gradient is asked for, ``need_x``
    that of x.
    """
    positions = {name: i for i, name in enumerate(schema.arguments)}
    arguments = [grads.get(i, f"_grad_{i}") for i in range(len(outputs))]
    nothing = f"({'None, ' * len(positions)})"
    body = []
    for i, grad in grads.items():
        if outputs[i].may_be_empty:  # an output that was left out has no gradient, whatever comes of it
            body += [f"if {grad} is not None and not {grad}.numel():", f"    {grad} = None"]
    body += [f"if {' and '.join(f'{g} is None' for g in grads.values())}:", f"    return {nothing}"]
    if saved:
        body.append(f"{', '.join(saved)}, = ctx.saved_tensors")
    if options:
        body.append(f"{', '.join(options)}, = ctx.options")
    flags = {name: f"_needs[{positions[name]}]" for name in returned}
    values = [
        f"[{', '.join(flags.values())}]" if name == "wanted" else flags[name[5:]] if name[:5] == "need_" else name
        for name in call
    ]
    results = {name: f"_d_{name}" for name in returned}
    for name in returned:
        if "wanted" in call or f"need_{name}" in call or (name in schema.optional and name not in saved):
            results[name] += f" if {flags[name]} else None"
        elif name in schema.optional:
            results[name] += f" if {name} is not None else None"
    if any("_needs[" in text for text in (*values, *results.values())):
        body.append("_needs = ctx.needs_input_grad")
    body.append(f"{', '.join(f'_d_{name}' for name in returned)} = _backward({', '.join(values)})")
    body.append(f"return {', '.join(results.get(name, 'None') for name in positions)}")
    return function(f"{op}_backward", ("ctx", *arguments), body, _backward=backward)
