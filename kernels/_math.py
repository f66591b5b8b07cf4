"""Elementary functions to a few ulp in float32, for any kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x to a few ulp: the hardware's 2^x alone loses |x| / 2 ulp to the rounding of x log2(e)."""
    k = tl.minimum(tl.maximum(tl.floor(x * 1.4426950408889634 + 0.5), -126.0), 127.0)
    return tl.exp((x - k * 0.693359375) + k * 2.12194440e-4) * tl.exp2(k)


@triton.jit
def log1p_unit(z):
    """log(1 + z) for z in [0, 1], exact to an ulp also where z is tiny: 2 atanh(z / (2 + z))."""
    q = z / (2.0 + z)
    w = q * q
    p = 1.0 / 11.0 + w * (1.0 / 13.0)
    p = 1.0 / 5.0 + w * (1.0 / 7.0 + w * (1.0 / 9.0 + w * p))
    return 2.0 * q * (1.0 + w * (1.0 / 3.0 + w * p))


@triton.jit
def tanh(r, e):
    """tanh r, given e = e^(-2|r|): the quotient, and near zero, where that cancels, Cephes' tanhf."""
    far = (1.0 - e) / (1.0 + e)
    w = r * r
    p = ((-5.70498872745e-3 * w + 2.06390887954e-2) * w - 5.37397155531e-2) * w + 1.33314422036e-1
    near = ((p * w - 3.33332819422e-1) * w) * r + r
    return tl.where(w < 0.390625, near, tl.where(r < 0, -far, far))


@triton.jit
def tanh_of(r):
    """tanh r alone."""
    return tanh(r, exp(-2.0 * tl.abs(r)))
