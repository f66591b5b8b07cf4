// What bind_cpu.cpp may call: one argument struct per family, and the list of kernels, which are compiled for every
// instruction set. Python fills a struct by the names of its fields; those that a call leaves out are zero.
// All strides are in elements; a tensor is (N, C, S), S the product of its spatial axes (see genfast/ops/_layout.py).
#pragma once

#include <stdint.h>

#include "../fields.h"

namespace genfast {

struct View {  // element (n, c, s) stands at data + n * n_stride + c * c_stride + s * s_stride
  GENFAST_FIELDS(
      (const void*, data)
      (int64_t, n, c, s)
  )
};

struct AffineCouplingArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (View, x)  // forward: the input; backward: whichever of input and output was kept
      (View, grad_y)  // backward only
      (View, params)
      (void*, y, params_out)  // contiguous in x's order; backward: grad x and grad params
      (const void*, grad_logdet)
      (void*, logdet)
      (const void*, alpha)
      (void*, grad_alpha)  // (N, width), backward only
      (const uint8_t*, mask)
      (int64_t, n, c, s, width, r_offset, t_offset, step)
      (int, scale)
      (bool, last, inverse, keep_output, channels_last, shift_first)
      (int, threads)
  )
};

struct ActNormArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (View, x, grad_y)
      (const void*, scale, bias, grad_logdet)
      (void*, y, logdet, grad_scale, grad_bias)
      (int64_t, n, c, s)
      (bool, channels_last, log_scale, inverse)
      (int, threads)
  )
};

struct ChannelMixArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (View, x, x_b)  // channels [0, first) and [first, c)
      (View, grad, grad_b)  // weight gradient only; channels [0, split) and [split, c)
      (int64_t, first, split)
      (const void*, weight, bias)
      (bool, transposed)
      (void*, y, y_b, grad_weight, grad_bias)
      (int64_t, n, c, s)
      (bool, channels_last)
      (int, threads)
  )
};

struct PluArgs {
  GENFAST_FIELDS(
      (bool, is_double, log_scale)
      (const int64_t*, perm)
      (const void*, lower, upper, sign_s, log_s, scale, bias)
      (void*, weight, folded, logdet)
      (const void*, grad_weight, grad_folded, grad_logdet)
      (void*, grad_lower, grad_upper, grad_log_s, grad_scale, grad_bias)
      (int64_t, c, batch, positions)
  )
};

struct PixelRnnArgs {
  GENFAST_FIELDS(
      (bool, is_double, diagonal)
      (View, gates, grad_h)  // forward only; backward only
      (const void*, weight, h0, c0)  // (4h, h, taps); (positions, h) or null
      (void*, out)  // h forward, grad gates backward; dense, in the order of gates or of grad_h
      (void*, kept)  // (N, H, W, 5, h): written forward unless null, read backward
      (const void*, grad_kept)  // may be null
      (void*, grad_weight, grad_h0, grad_c0)
      (int64_t, n, hidden, height, width, taps)
      (bool, channels_last)
      (int, threads)
  )
};

struct NadeArgs {
  enum Activation { kSigmoid, kRelu, kTanh };
  enum Kind { kParameters, kBernoulli, kCategorical, kGaussianMixture };
  GENFAST_FIELDS(
      (bool, is_double, own_hidden_bias)  // whether each sample has a hidden bias of its own
      (int, activation, kind)
      (const void*, x)  // (N, D), (D, N) in the backward; sampling: what is known, or null
      (const void*, weight, readout, bias)  // (D, H), (D, P, H), (D, P)
      (const void*, hidden_bias, rescale)  // (H) or (N, H); (D) or null
      (const void*, uniforms)  // sampling: (N, D, 1), or 2 of a mixture
      (const uint8_t*, known)  // (N, D), or null
      (const void*, grad)  // not null: the backward; (D, N, P)
      (void*, out)  // forward (N, D, P), sampling (N, D)
      (void*, grad_x, grad_rescale)  // (D, N), (D), null where not wanted
      (void*, grad_weight, grad_readout, grad_bias, grad_hidden_bias)
      (int64_t, n, d, p, h)
      (int, threads)
  )
};

struct SqueezeArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (const void*, x)
      (void*, y)
      (int64_t, n, c, h, w, factor)  // of the unsqueezed side
      (bool, space_to_depth, inverse, channels_last)
      (int, threads)
  )
};

struct MaskedConvArgs {
  GENFAST_FIELDS(
      (bool, is_double, relu)
      (const void*, x, grad_y, saved)  // (N, C, D, H, W); saved: the output, for relu
      (const int64_t*, x_stride, grad_stride, saved_stride, y_stride)  // 5 each
      (void*, y)  // the output; in the backward grad x, or null
      (const void*, weight, bias)  // (O, C / groups, kernel), (O,) or null
      (const uint8_t*, centre)  // (O, C / groups), which pairs live; null: all
      (const int64_t*, taps)  // tap_count rows of dz, dy, dx, index
      (void*, grad_weight, grad_bias)  // null where not wanted
      (int64_t, tap_count, kernel, n, cin, cout, groups, d, h, w)
      (int, threads)
  )
};

struct PixelProgramArgs {
  GENFAST_FIELDS(
      (const int64_t*, program)  // as genfast/programs/pixel_program.py writes it
      (const float*, weights)
      (const int64_t*, statics)  // per map: address, strides by image, row and column
      (float*, cache)  // (n, image_floats), zero before the first row
      (int64_t*, images)  // (n, channels, height, width): levels, read and written
      (const float*, uniforms)  // (n, uniforms, height, width)
      (float*, record)  // (n, height, width, record_size): what each pixel was drawn from; null: not kept
      (int64_t*, faults)  // (n): 1 + (row * width + column) * channels + colour where first nothing could be drawn; 0: nowhere
      (int64_t, record_size, n, group, first_row, last_row, given)  // image rows below `given` keep their levels
      (int64_t, period, active)  // of `period` rows the first `active` are the image's, the others zero: the gap between frames
      (float, temperature)
      (int, threads)
  )
};

struct LogisticMixtureArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (View, params)
      (View, x)  // integers of x_bytes bytes
      (int, x_bytes)
      (bool, x_signed)
      (const void*, grad)  // (N, S)
      (void*, nll, grad_params)  // (N, S) and dense in params' order
      (const float*, uniforms)  // (N, 1 + C, S)
      (int64_t*, samples)  // (N, C, S)
      (Result<int64_t>, fault)  // the first element drawn from parameters that are not finite, or -1
      (double, temperature)
      (int64_t, n, s, mixtures, channels, levels)
      (bool, channels_last, stream)
      (int, threads)
  )
};

struct GatedActivationArgs {
  enum Bias { kNone, kChannel, kSample, kFull };  // (2C,), (N, 2C), (N, 2C, S)
  GENFAST_FIELDS(
      (bool, is_double)
      (View, x, bias, grad)
      (void*, y, grad_bias)  // backward: grad x; dense in x's order
      (int64_t, n, c, s, groups)  // c channels of y
      (int, bias_mode)
      (bool, channels_last)
      (int, threads)
  )
};

struct LinearArgs {  // out (rows, columns) = sum over k of a[row, k] b[k, column], then the epilogue
  enum Bits { kNone, kMake, kApply };
  GENFAST_FIELDS(
      (bool, is_double)
      (const void*, a, b, bias)  // bias (columns,) or null
      (int64_t, a_row, a_inner, b_inner, b_column)  // strides
      (void*, out)  // dense
      (uint8_t*, bits)  // (rows, ceil(columns / 8)): leaky relu writes its signs, or they are applied
      (int, bits_mode)
      (double, slope)
      (int64_t, rows, columns, inner)
      (int, threads)
  )
};

struct MaskedLinearArgs {
  GENFAST_FIELDS(
      (bool, is_double, relu)
      (Result<bool>, fits)  // false where rows or columns are no permutations or counts no staircase, and nothing was done
      (const int64_t*, rows, columns, counts)  // (outputs,), (inputs,), (outputs,)
      (const void*, x, weight, bias, grad, y)  // bias (outputs,) or null; y of a relu, or null
      (int64_t, x_row, weight_row, grad_row, y_row)  // strides; columns are contiguous
      (void*, out, dx, dw, db)  // dense; those of the backward that are not null
      (int64_t, n, outputs, inputs)
      (int, threads)
  )
};

struct LeakyReluArgs {
  GENFAST_FIELDS(
      (bool, is_double, apply)  // apply: the given bits instead of x's signs
      (const void*, x)
      (void*, y)  // may be x
      (uint8_t*, bits)  // (rows, ceil(columns / 8))
      (double, slope)
      (int64_t, rows, columns)
      (int, threads)
  )
};

struct ActivationArgs {  // dense tensors in one order
  enum Kind { kSilu, kGelu, kGeluTanh, kTanh, kSigmoid, kSoftplus, kElu, kSelu, kMish };
  GENFAST_FIELDS(
      (bool, is_double, second)
      (const void*, x, grad, tangent, cotangent)  // tangent: second only; cotangent: null where there is none
      (void*, y)
      (int64_t, size)
      (int, kind)
      (int, threads)
  )
};

struct BiasActArgs {
  enum Act { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };
  GENFAST_FIELDS(
      (bool, is_double)
      (View, x, grad, grad_dx)  // grad: from the backward on; grad_dx: second order only
      (const void*, bias)  // (C,) or null
      (void*, y, grad_bias)  // backward: grad x; dense in x's order
      (int64_t, n, c, s)
      (int, act)
      (double, alpha, gain, clamp)  // clamp < 0: none
      (bool, channels_last)
      (int, threads)
  )
};

struct PixelNormArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (View, x, grad)  // grad: backward only
      (void*, y)  // backward: grad x; dense in x's order
      (int64_t, n, c, s)
      (double, eps)
      (bool, channels_last)
      (int, threads)
  )
};

struct MinibatchStddevArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (View, x, grad)  // grad: backward only, (N, C + F, S)
      (void*, y)  // (N, C + F, S); backward: grad x; dense in x's order
      (int64_t, n, c, s, group, features)
      (double, eps)
      (bool, channels_last)
      (int, threads)
  )
};

struct Upfirdn2dArgs {
  GENFAST_FIELDS(
      (bool, is_double, separable, flip, channels_last)
      (const void*, x, filter)  // filter (fh, fw); where separable (fw,), along both axes
      (void*, y)  // dense in x's order
      (double, gain)
      (int64_t, n, c, h, w, oh, ow, fh, fw, upx, upy, downx, downy, padx0, pady0)
      (int64_t, xn, xc, xh)  // strides; a row is contiguous: (W,) or, channels_last, (W, C)
      (int, threads)
  )
};

struct ChannelScaleArgs {
  GENFAST_FIELDS(
      (bool, is_double, channels_last)
      (View, x, grad)
      (const void*, scale)  // (N, C)
      (void*, dx, grad_scale, grad_noise)  // dense in x's order, (N, C), (N, S) or null
      (int64_t, n, c, s)
      (int, threads)
  )
};

struct TapEnergyArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (const void*, weight)  // (rows, taps)
      (void*, out)  // (rows,)
      (int64_t, rows, taps)
      (int, threads)
  )
};

// In the two below a sample is a run of d dense elements, and samples lie *_stride apart.
struct InterpolateArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (const void*, real, fake, grad, epsilon)
      (void*, grad_real, grad_fake, grad_epsilon)  // null where not wanted; dense
      (int64_t, n, d, real_stride, fake_stride, grad_stride)
      (int, threads)
  )
};

struct SampleNormArgs {
  GENFAST_FIELDS(
      (bool, is_double, squared)
      (const void*, x, grad, norm)  // grad, norm: (N,), backward only
      (void*, out)  // (N,) forward, grad x backward, dense
      (int64_t, n, d, x_stride)
      (int, threads)
  )
};

struct SpectralNormArgs {
  GENFAST_FIELDS(
      (bool, is_double, from_v)  // from_v: an iteration updates u first
      (const void*, weight, grad)  // dense (a, h, b): row h, column a * b's size + b; grad: backward only
      (void*, u, v, sigma, out)  // u (h,), v (a * b,): read and written forward, read backward
      (const void*, grad_sigma)  // null: none
      (int64_t, a, h, b, iterations)
      (double, eps)
      (int, threads)
  )
};

struct PairwiseL1Args {
  GENFAST_FIELDS(
      (bool, is_double, include_self)
      (const void*, m, grad, tangent)  // dense (n, b, c), (n, b), (n, b, c); grad: backward; tangent: second backward only
      (void*, out, grad_m)  // (n, b): sums, or in the second backward the gradient of grad; (n, b, c)
      (int64_t, n, b, c)
      (int, threads)
  )
};

// N rows of d dense elements; *_stride apart where they are inputs, d apart where they are outputs.
struct DiagonalGaussianArgs {
  struct Rows {
    GENFAST_FIELDS(
        (const void*, data)  // null: not given
        (int64_t, stride)
    )
  };
  GENFAST_FIELDS(
      (bool, is_double)
      (Rows, mean, log_variance, noise, prior_mean, prior_log_variance)
      (Rows, grad_z)  // backward only, as the two below
      (const void*, grad_kl, grad_dimension)  // (N,), (d,); null where there is none
      (void*, kl, dimension, z)  // forward: (N,); (d,) and rows, null where not wanted
      (void*, grad_mean, grad_log_variance, grad_noise, grad_prior_mean, grad_prior_log_variance)  // null where not wanted
      (int64_t, n, d)
      (int, threads)
  )
};

struct ContextualArgs {
  enum Distance { kCosine, kL2, kL1 };
  GENFAST_FIELDS(
      (bool, is_double, over_targets)
      (int, distance)
      (const void*, x, y)  // (b, n, c), (b, m, c), dense
      (const void*, prior_rows, prior_columns)  // (n, prior_height), (n, prior_width), or null
      (void*, value, statistics, mean)  // (b, n) over targets, else (b, m); (b, 3, n); (b, n, c) or null
      (int64_t*, winner, nearest)  // value's shape; (b, n)
      (const void*, grad)  // backward only: value's shape
      (void*, dx, dy)  // backward only: x's and y's shapes, or null
      (void*, work)  // bytes of it, or null
      (Result<int64_t>, bytes)  // without work: how much of it to bring, and nothing else
      (double, prior_weight, bandwidth, eps)
      (int64_t, b, n, m, c, prior_height, prior_width)
      (int, threads)
  )
};

struct GramArgs {
  GENFAST_FIELDS(
      (bool, is_double, channels_last)
      (View, x)
      (const void*, target)  // (n, c, c) or, with target_stride 0, (c, c); null: the Gram matrix itself
      (int64_t, target_stride)
      (void*, out, value)  // (n, c, c): G, or the symmetric part of G - target; (n,), with a target only
      (double, scale, shift, factor)
      (int64_t, n, c, s)
      (int, threads)
  )
};

struct GramBackwardArgs {  // out = scale grad_n M (x + shift), M the matrix, or with symmetrize the matrix plus its transpose
  GENFAST_FIELDS(
      (bool, is_double, channels_last, symmetrize)
      (View, x)
      (const void*, matrix, grad)  // (n, c, c); (n,) or null
      (void*, out)  // dense in x's order
      (double, scale, shift)
      (int64_t, n, c, s)
      (int, threads)
  )
};

struct PairwiseArgs {
  enum Mode { kSums, kGradient, kNearest };
  enum Function { kRbf, kImq, kPolynomial };
  GENFAST_FIELDS(
      (bool, is_double, exclude_diagonal)
      (int, mode, kernel)
      (const void*, x, y)  // dense (b, n, c), (b, m, c); y null: x itself, m = n
      (const void*, x_grad, y_grad)  // gradient only: (b, n), (b, m), whose sum weighs a pair; null counts zero
      (void*, out)  // sums (b, n), gradient (b, n, c), squared distances (b, n, k)
      (int64_t*, index)  // nearest only: (b, n, k)
      (const double*, scales)
      (int64_t, count, degree, k)
      (double, offset)
      (int64_t, b, n, m, c)
      (int, threads)
  )
};

struct DegreeOrderedArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (const int64_t*, code)  // as genfast/programs/degree_program.py writes it
      (const void*, packed, statics, z)  // (packed), (n, statics) or null, (n, inputs)
      (void*, x, logdet)  // (n, inputs), (n,)
      (void*, units, deltas)  // (units, stride): every unit, x given; the cotangents of products and points
      (int64_t, stride)  // at least n, in whole vectors
      (const void*, grad_x, grad_logdet)  // null where there is none
      (void*, grad_z, grad_packed)
      (int, transform)
      (const double*, options)
      (int64_t, option_count, n)
      (int, threads)
  )
};

struct FmaRateArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (void*, out)  // 64 bytes a thread
      (Result<double>, flops)  // of all threads together
      (int64_t, rounds)
      (int, threads)
  )
};

struct SplineArgs {
  struct Part {  // one tensor of parameters: n rows of `count`, `stride` apart; its gradient's rows are dense
    GENFAST_FIELDS(
        (const void*, data)
        (void*, grad)
        (int64_t, count, stride)
    )
  };
  using Parts = Part[3];
  GENFAST_FIELDS(
      (bool, is_double, backward, inverse, zuko)
      (int, bins, tails)  // see spline.h
      (double, left, right, bottom, top, min_width, min_height, min_derivative, log_slope, logit_scale)
      (const void*, x, grad_y, grad_logdet)  // dense; a cotangent may be null, or one number for all (its step 0)
      (int64_t, grad_y_step, grad_logdet_step)
      (void*, y, logdet, dx)
      (Parts, parts)
      (int, part_count)
      (int64_t, n)
      (Result<bool>, outside)  // set where there are no tails and an element is outside
      (int, threads)
  )
};

// Each kernel and its arguments.
// The program's format stands at the head of genfast/programs/flow_program.py.
struct FlowProgramArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (const int64_t*, code)
      (const double*, options)
      (const void*, x, context)  // (N, D), (N, K)
      (const void*, weights)  // one vector
      (void*, z, total)  // (N, D), (N,); forward only
      (void*, values)  // (tiles, rows + 1, tile): written by a forward whose gradient is asked for, read by the backward
      (const void*, grad_z, grad_total)  // backward only, as the rest; either may be null
      (void*, grad_x, grad_context, grad_weights)  // the first two may be null
      (void*, scratch)
      (Result<int64_t>, size)  // of flow_program_scratch: the elements that a call needs there
      (bool, backward, again)  // of that: which call, and whether it computes the values (again)
      (int64_t, n, tile)
      (int, threads)
  )
};

struct AdamArgs {
  GENFAST_FIELDS(
      (bool, is_double)
      (const uint64_t*, addresses)  // of each tensor: the weights, the gradient and the two moments
      (const int64_t*, sizes)
      (int64_t, count)
      (double, lr, beta1, beta2, eps, weight_decay, correction1, root_correction2)
      (bool, decoupled, maximize)
      (int, threads)
  )
};

#define GENFAST_KERNELS(K) \
  K(affine_coupling, AffineCouplingArgs) \
  K(affine_coupling_backward, AffineCouplingArgs) \
  K(actnorm, ActNormArgs) \
  K(actnorm_backward, ActNormArgs) \
  K(channel_mix, ChannelMixArgs) \
  K(channel_mix_weight_grad, ChannelMixArgs) \
  K(plu_weight, PluArgs) \
  K(plu_weight_backward, PluArgs) \
  K(squeeze, SqueezeArgs) \
  K(masked_conv, MaskedConvArgs) \
  K(masked_conv_backward, MaskedConvArgs) \
  K(pixel_program, PixelProgramArgs) \
  K(gated_activation, GatedActivationArgs) \
  K(gated_activation_backward, GatedActivationArgs) \
  K(bias_act, BiasActArgs) \
  K(bias_act_backward, BiasActArgs) \
  K(bias_act_second, BiasActArgs) \
  K(pixel_norm, PixelNormArgs) \
  K(pixel_norm_backward, PixelNormArgs) \
  K(minibatch_stddev, MinibatchStddevArgs) \
  K(minibatch_stddev_backward, MinibatchStddevArgs) \
  K(logistic_mixture_nll, LogisticMixtureArgs) \
  K(logistic_mixture_nll_backward, LogisticMixtureArgs) \
  K(logistic_mixture_sample, LogisticMixtureArgs) \
  K(linear, LinearArgs) \
  K(masked_linear, MaskedLinearArgs) \
  K(masked_linear_backward, MaskedLinearArgs) \
  K(leaky_relu_bits, LeakyReluArgs) \
  K(activation, ActivationArgs) \
  K(pixel_rnn, PixelRnnArgs) \
  K(pixel_rnn_backward, PixelRnnArgs) \
  K(nade, NadeArgs) \
  K(upfirdn2d, Upfirdn2dArgs) \
  K(channel_scale_backward, ChannelScaleArgs) \
  K(tap_energy, TapEnergyArgs) \
  K(interpolate_backward, InterpolateArgs) \
  K(sample_norm, SampleNormArgs) \
  K(sample_norm_backward, SampleNormArgs) \
  K(spectral_norm, SpectralNormArgs) \
  K(spectral_norm_backward, SpectralNormArgs) \
  K(pairwise_l1, PairwiseL1Args) \
  K(diagonal_gaussian, DiagonalGaussianArgs) \
  K(diagonal_gaussian_backward, DiagonalGaussianArgs) \
  K(contextual_similarity, ContextualArgs) \
  K(contextual_similarity_backward, ContextualArgs) \
  K(gram_matrix, GramArgs) \
  K(gram_matrix_backward, GramBackwardArgs) \
  K(pairwise, PairwiseArgs) \
  K(autoregressive_inverse, DegreeOrderedArgs) \
  K(autoregressive_inverse_sweep, DegreeOrderedArgs) \
  K(autoregressive_inverse_weights, DegreeOrderedArgs) \
  K(spline, SplineArgs) \
  K(flow_program_scratch, FlowProgramArgs) \
  K(flow_program, FlowProgramArgs) \
  K(flow_program_backward, FlowProgramArgs) \
  K(adam, AdamArgs) \
  K(fma_rate, FmaRateArgs)

#define GENFAST_DECLARE(kernel, Args) void kernel(const Args&);
namespace base {
GENFAST_KERNELS(GENFAST_DECLARE)
}
#ifdef GENFAST_X86_LEVELS
namespace v3 {
GENFAST_KERNELS(GENFAST_DECLARE)
}
namespace v4 {
GENFAST_KERNELS(GENFAST_DECLARE)
}
#endif
#undef GENFAST_DECLARE

}  // namespace genfast
