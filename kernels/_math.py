"""Elementary functions to a few ulp in float32, for any kernel.

Written for few instructions, which bound a kernel whose data is narrow: on sm_90, exp takes 6, inverse 4 (a division 8)
and log1p_unit 10, as counted in machine code.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x to two ulp beside the hardware's 2^x, whose argument's rounding, else |x| / 2 ulp, is made good; 0 below
    2^-126."""
    high = x * 1.4426950408889634
    lost = tl.fma(high, 1.904654323148236e-9, tl.fma(high, -0.693147182464599609375, x))  # x - high ln 2, of 48 bits
    e = tl.exp2(high)
    return tl.where(tl.abs(x) < 88.7, tl.fma(e, lost, e), e)


@triton.jit
def inverse(x):
    """1 / x to an ulp for x from 2^-60 to 2^60."""
    r = tl.rsqrt(x)
    r = r * r
    return tl.fma(r, tl.fma(-x, r, 1.0), r)


@triton.jit
def log1p_unit(z):
    """log(1 + z) for z in [0, 1] to two ulp, also where z is tiny: z times the best polynomial of degree 9."""
    p = 0.01985159143805504 - z * 0.0032440535724163055
    p = p * z - 0.05695977807044983
    p = p * z + 0.10603679716587067
    p = p * z - 0.1530560702085495
    p = p * z + 0.1967594474554062
    p = p * z - 0.24954134225845337
    p = p * z + 0.3332996368408203
    p = p * z - 0.4999990165233612
    return (p * z + 1.0) * z


@triton.jit
def tanh(r, e):
    """tanh r, given e = e^(-2|r|): the quotient, and near zero, where that cancels, Cephes' tanhf."""
    far = (1.0 - e) * inverse(1.0 + e)
    w = r * r
    p = ((-5.70498872745e-3 * w + 2.06390887954e-2) * w - 5.37397155531e-2) * w + 1.33314422036e-1
    near = ((p * w - 3.33332819422e-1) * w) * r + r
    return tl.where(w < 0.390625, near, tl.where(r < 0, -far, far))


@triton.jit
def tanh_of(r):
    """tanh r alone."""
    return tanh(r, exp(-2.0 * tl.abs(r)))
