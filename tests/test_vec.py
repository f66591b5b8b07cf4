"""The functions of csrc/cpu/vec.h against long double, in units of the last place, at every level this processor
has."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = r"""
#include <math.h>
#include <stdio.h>
#include "cpu/vec.h"
using namespace genfast::GENFAST_ISA;

// |found - exact| in steps of T at exact; results that are denormal or overflow are left out.
template <class T> double ulp(T found, long double exact) {
  const T rounded = T(exact);
  if (!isfinite(double(rounded)) || fabs(double(rounded)) < double(sizeof(T) == 4 ? 1.2e-38f : 2.3e-308)) return 0;
  const double size = fabs(double(rounded));
  const T next = sizeof(T) == 4 ? T(nextafterf(float(size), INFINITY)) : T(nextafter(size, INFINITY));
  return double(fabsl((long double)found - exact) / ((long double)next - (long double)size));
}

template <class T> Vec<T> f_exp(Vec<T> x) { return genfast::GENFAST_ISA::exp<T>(x); }
template <class T> Vec<T> f_log1p(Vec<T> x) { return log1p_unit<T>(x); }
template <class T> Vec<T> f_tanh(Vec<T> x) { return genfast::GENFAST_ISA::tanh<T>(x); }
template <class T> Vec<T> f_sigmoid(Vec<T> x) { Vec<T> s, o, l; sigmoid<T>(x, s, o, l); return s; }
template <class T> Vec<T> f_log(Vec<T> x) { return genfast::GENFAST_ISA::log<T>(x); }
template <class T> Vec<T> f_erfc_scaled(Vec<T> x) { return erfc_scaled<T>(x); }
long double erfc_scaledl(long double x) { return expl(x * x) * erfcl(x); }
template <class T> Vec<T> f_root(Vec<T> x) { return root(x); }
long double sigmoidl(long double x) { return 1 / (1 + expl(-x)); }

template <class T>
void worst(const char* name, Vec<T> (*f)(Vec<T>), long double (*exact)(long double), double from, double to) {
  double most = 0;
  const int n = 400000;
  for (int i = 0; i < n; i += lanes<T>()) {
    T in[lanes<T>()], out[lanes<T>()];
    for (int k = 0; k < lanes<T>(); ++k) in[k] = T(from + (to - from) * (i + k + 0.37) / n);
    store(out, f(load(in)));
    for (int k = 0; k < lanes<T>(); ++k) most = fmax(most, ulp<T>(out[k], exact((long double)in[k])));
  }
  printf("%s %d %.3f\n", name, int(sizeof(T)), most);
}

template <class T> void all() {
  worst<T>("exp", f_exp<T>, expl, sizeof(T) == 4 ? -87 : -708, sizeof(T) == 4 ? 88 : 709);
  worst<T>("exp", f_exp<T>, expl, -1, 1);
  worst<T>("log1p_unit", f_log1p<T>, log1pl, 0, 1);
  worst<T>("tanh", f_tanh<T>, tanhl, -3, 3);
  worst<T>("tanh", f_tanh<T>, tanhl, -25, 25);
  worst<T>("sigmoid", f_sigmoid<T>, sigmoidl, -30, 30);
  worst<T>("log", f_log<T>, logl, 1e-3, 4);
  worst<T>("log", f_log<T>, logl, 1, 1e6);
  worst<T>("erfc_scaled", f_erfc_scaled<T>, erfc_scaledl, 0, 4);
  worst<T>("erfc_scaled", f_erfc_scaled<T>, erfc_scaledl, 0, 60);
  worst<T>("root", f_root<T>, sqrtl, 0, 1e3);
}

int main() { all<float>(); all<double>(); }
"""
# As the head of csrc/cpu/vec.h says.
BOUNDS = {"exp": 2, "log1p_unit": 3, "tanh": 3, "sigmoid": 4, "log": 1, "erfc_scaled": 9, "root": 0.5}


@pytest.mark.parametrize("level", ["base", "v3", "v4"])
def test_errors_in_units_of_the_last_place(level, tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if level != "base" and not x86:
        pytest.skip(f"{level} is a level of x86-64")
    source, program = tmp_path / "ulp.cpp", tmp_path / "ulp"
    source.write_text(SOURCE)
    flags = {"base": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}[level]
    command = [compiler, "-std=c++17", "-O2", "-w", *flags, f"-DGENFAST_ISA={level}", f"-I{ROOT / 'csrc'}", str(source)]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run([str(program)], capture_output=True, text=True)
    if done.returncode == -4:  # SIGILL
        pytest.skip(f"this processor does not run {level}")
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 22
    for name, size, worst in lines:
        assert 0 < float(worst) <= BOUNDS[name], (name, size, worst)
