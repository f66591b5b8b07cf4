"""The kernels are filled by name: every name in genfast/ is a field, and what is no field never becomes a number."""

from __future__ import annotations

import ast
import gc
import importlib
import os
import platform
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import genfast
from genfast._native import kernels

_cpu = pytest.importorskip("genfast._cpu")
PACKAGE = Path(genfast.__file__).parent
KERNELS = {name: value for name, value in vars(_cpu).items() if type(value).__name__ == "Kernel"}
WITHOUT_OP = {"fma_rate"}  # of the benchmarks


def modules():
    """The modules that call kernels, with their syntax."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if (
            "kernels(" in text
            and path.name != "_native.py"
            and "/kernels/" not in str(path.relative_to(PACKAGE.parent))
        ):
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            yield importlib.import_module(name), ast.parse(text)


def calls():
    """(module, namespace, kernel, method or "", keywords) of each call of a kernel of a namespace by its name."""
    for module, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            chain, method = node.func, ""
            if chain.attr == "prepare" and isinstance(chain.value, ast.Attribute):
                chain, method = chain.value, "prepare"
            if isinstance(chain.value, ast.Name) and chain.value.id in ("_CPU", "_CUDA"):
                yield module, chain.value.id, chain.attr, method, [k.arg for k in node.keywords]


def test_every_keyword_is_a_field_and_none_is_missing():
    seen = 0
    for module, namespace, kernel, method, keywords in calls():
        fields = getattr(getattr(getattr(module, namespace), kernel, None), "fields", None)
        if fields is None:  # a plain function, or an extension that is not built
            continue
        where = f"{module.__name__}: {namespace}.{kernel}"
        if None not in keywords:  # **fields are checked when the plan is made
            assert set(keywords) <= set(fields), where
        if not method:
            assert {name for name, kind in fields.items() if not kind.endswith("?")} <= set(keywords), where
        seen += 1
    assert seen >= 50


def test_each_kernel_is_called_by_some_module():
    called = {kernel for _, namespace, kernel, _, _ in calls() if namespace == "_CPU"}
    named = set()
    for module, _ in modules():
        named |= set(vars(module._CPU)) if getattr(module, "_CPU", None) is not None else set()
    assert set(KERNELS) - WITHOUT_OP <= named
    assert called <= named


def test_a_wrong_name_fails_at_import():
    with pytest.raises(
        TypeError, match=r"pixel_norm: it has no field width, expected one of is_double, x, grad, y, n,"
    ):
        kernels("_cpu", pixel_norm="is_double x y width")
    with pytest.raises(TypeError, match="the field x is named twice"):
        kernels("_cpu", pixel_norm="x y x")
    with pytest.raises(AttributeError, match="pixel_normal"):
        kernels("_cpu", pixel_normal="x y")


X = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"width": 3, "y": X}, TypeError, "it has no field width, expected one of is_double, x,"),
        ({"y": 3.0}, TypeError, "y is a float, expected a tensor, an address or None"),
        ({"y": "X"}, TypeError, "y is a str"),
        ({"y": True}, TypeError, "y is a bool"),
        ({"y": -1}, OverflowError, "y does not fit in 64 bits"),
        ({"y": X, "n": X}, TypeError, "n is a Tensor, expected an int"),
        ({"y": X, "n": 2.0}, TypeError, "n is a float, expected an int"),
        ({"y": X, "n": True}, TypeError, "n is a bool, expected an int"),
        ({"y": X, "n": 2**63}, OverflowError, "n does not fit in 64 bits"),
        ({"y": X, "threads": 2**31}, OverflowError, "threads does not fit in 32 bits"),
        ({"y": X, "eps": True}, TypeError, "eps is a bool, expected a float"),
        ({"y": X, "eps": None}, TypeError, "eps is a NoneType, expected a float"),
        ({"y": X, "is_double": 0}, TypeError, "is_double is a int, expected a bool"),
        ({"x": (X, 3, 1), "y": X}, TypeError, "x has no address"),
        ({"x": (X, 3), "y": X}, TypeError, "x is a tuple, expected a tuple of data n c s, or of all but the first"),
        ({"x": (X, 3, 1, 1.0), "y": X}, TypeError, "s is a float, expected an int"),
        ({"x": X, "y": X}, TypeError, "x is an address, and its strides were not prepared"),
        ({"n": 2, "c": 3}, TypeError, "no address is set: one of x, grad, y"),
    ],
)
def test_values_that_do_not_fit_are_refused(fields, error, message):
    with pytest.raises(error, match=f"genfast kernel pixel_norm: .*{message}"):
        _cpu.pixel_norm(**fields)


def test_two_fields_that_are_swapped_are_refused_or_right():
    """By name an exchange of two arguments changes nothing; an exchange of two names does not pass for other kinds."""
    y, expected = torch.empty_like(X), genfast.ops.pixel_norm(X)
    fields = {"x": (X, 3, 1, 1), "y": y, "n": 2, "c": 3, "s": 1, "eps": 1e-8, "channels_last": True, "threads": 1}
    for names in (list(fields), list(reversed(fields))):
        y.zero_()
        _cpu.pixel_norm(**{name: fields[name] for name in names})
        assert torch.equal(y, expected)
    for a, b in (("x", "y"), ("y", "n"), ("n", "eps"), ("c", "channels_last")):
        with pytest.raises(TypeError):
            _cpu.pixel_norm(**fields | {a: fields[b], b: fields[a]})
    with pytest.raises(TypeError, match="it takes its fields by name"):
        _cpu.pixel_norm(X, y)


def test_declared_fields_must_be_filled_and_no_others():
    kernel = _cpu.pixel_norm.declare("x", "y", "n", "c?")
    assert kernel.fields == {"x": "(address, int, int, int)", "y": "address", "n": "int", "c": "int?"}
    with pytest.raises(TypeError, match="not set: n"):
        kernel(x=None, y=X)
    with pytest.raises(TypeError, match="not declared: s, eps"):
        kernel(x=None, y=X, n=0, eps=1e-8, s=1)
    assert kernel(x=None, y=X, n=0) is None
    assert kernel.prepare(n=0, c=3)(x=None, y=X) is None
    with pytest.raises(TypeError, match="not set: x"):
        kernel.prepare(x=(3, 1, 1), n=0)(y=X)


def test_prepared_fields_hold_their_tensors():
    y, expected = torch.empty_like(X), genfast.ops.pixel_norm(X)
    x = X.clone()
    kernel = _cpu.pixel_norm.prepare(x=(3, 1, 1), n=2, c=3, s=1, eps=1e-8, channels_last=True, threads=1)
    bound = kernel.prepare(x=(x, 3, 1, 1)).prepare(y=y)
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is not None
    bound()
    assert torch.equal(y, expected)
    y.zero_()
    kernel(x=X, y=y)  # was not changed by what was prepared from it
    assert torch.equal(y, expected)
    y.zero_()
    kernel(x=X.data_ptr(), y=y.data_ptr())
    assert torch.equal(y, expected)
    del bound
    gc.collect()
    assert alive() is None


def test_names_from_many_call_sites():
    """Each dict makes a tuple of names of its own; only the first ones are remembered."""
    y, expected = torch.empty_like(X), genfast.ops.pixel_norm(X)
    fields = {"x": (X, 3, 1, 1), "y": y, "n": 2, "c": 3, "s": 1, "eps": 1e-8, "channels_last": True, "threads": 1}
    names = list(fields)
    for i in range(40):
        y.zero_()
        turned = names[i % 8 :] + names[: i % 8]
        _cpu.pixel_norm(**{name: fields[name] for name in turned})
        assert torch.equal(y, expected)
        with pytest.raises(TypeError, match=f"it has no field width{i}"):
            _cpu.pixel_norm(**{f"width{i}": i}, y=y)


def test_records_arrays_and_results():
    assert _cpu.spline.fields["parts"] == "(address, address, int, int)[]?"
    assert "outside" not in _cpu.spline.fields
    with pytest.raises(TypeError, match="parts has 4 items, expected at most 3"):
        _cpu.spline(x=X, parts=[(X, None, 1, 1)] * 4)
    with pytest.raises(TypeError, match="count is a NoneType"):
        _cpu.spline(x=X, parts=[(X, None, None, 1)])
    out = torch.empty(16)
    assert isinstance(_cpu.fma_rate(out=out, rounds=4, threads=1), float)


def test_a_kernel_that_cannot_allocate_raises_memory_error():
    with pytest.raises(MemoryError, match="genfast kernel actnorm: its working memory could not be allocated"):
        _cpu.actnorm(x=(X, 3, 1, 1), c=1 << 55, threads=1)


WORK_IN_MEMORY_OF_THREADS = {
    *("autoregressive_inverse", "autoregressive_inverse_sweep", "autoregressive_inverse_weights", "gram_matrix"),
    *("gram_matrix_backward", "linear", "masked_conv", "masked_linear", "masked_linear_backward", "nade", "pairwise"),
    *("pixel_program", "pixel_rnn", "upfirdn2d"),
}


def test_where_memory_is_missing_every_op_raises_memory_error_and_works_again_after(tmp_path):
    """Each request for memory that a kernel makes is refused in its turn. An exception that left a parallel region
    would end the process."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("memory is refused by a library preloaded with glibc")
    if os.environ.get("LD_PRELOAD"):
        pytest.skip(f"another library hands out memory: LD_PRELOAD={os.environ['LD_PRELOAD']}")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler: expected CXX, c++, g++ or clang++")
    library = tmp_path / "refused_memory.so"
    tests = Path(__file__).parent
    source = str(tests / "refused_memory.cpp")
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", source, "-o", str(library)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.without_memory"],
        cwd=tests.parent,
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    *before, last = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"status {done.returncode} in {last}: {done.stderr[-2000:]}"
    refused = set(last.partition("refused to ")[2].split(", "))
    assert refused >= WORK_IN_MEMORY_OF_THREADS
    assert refused <= set(KERNELS)
    assert len(before) > 500
