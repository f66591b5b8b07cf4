// What bind_cpu.cpp may call: one declaration per kernel, repeated for every instruction set it is compiled for.
// All strides are in elements; a tensor is (N, C, S), S the product of its spatial axes (see genfast/ops/_layout.py).
#pragma once

#include <stdint.h>

namespace genfast {

struct View {  // element (n, c, s) stands at data + n * n_stride + c * c_stride + s * s_stride
  const void* data;
  int64_t n, c, s;
};

struct AffineCouplingArgs {
  bool is_double;
  View x;       // forward: the input; backward: whichever of input and output was kept
  View grad_y;  // backward only
  View params;
  void *y, *params_out;  // contiguous in x's order; backward: grad x and grad params
  const void* grad_logdet;
  void* logdet;
  const void* alpha;
  void* grad_alpha;  // (N, width), backward only
  const uint8_t* mask;
  int64_t n, c, s, width, r_offset, t_offset, step;
  int scale;
  bool last, inverse, keep_output, channels_last;
  int threads;
};

struct ActNormArgs {
  bool is_double;
  View x, grad_y;
  const void *scale, *bias, *grad_logdet;
  void *y, *logdet, *grad_scale, *grad_bias;
  int64_t n, c, s;
  bool channels_last, log_scale, inverse;
  int threads;
};

struct ChannelMixArgs {
  bool is_double;
  View x, x_b;      // channels [0, first) and [first, c)
  View grad, grad_b;  // weight gradient only; channels [0, split) and [split, c)
  int64_t first, split;
  const void *weight, *bias;
  bool transposed;
  void *y, *y_b, *grad_weight, *grad_bias;
  int64_t n, c, s;
  bool channels_last;
  int threads;
};

struct PluArgs {
  bool is_double, log_scale;
  const int64_t* perm;
  const void *lower, *upper, *sign_s, *log_s, *scale, *bias;
  void *weight, *folded, *logdet;
  const void *grad_weight, *grad_folded, *grad_logdet;
  void *grad_lower, *grad_upper, *grad_log_s, *grad_scale, *grad_bias;
  int64_t c, batch, positions;
};

struct PixelRnnArgs {
  bool is_double, diagonal;
  View gates, grad_h;            // forward only; backward only
  const void *weight, *h0, *c0;  // (4h, h, taps); (positions, h) or null
  void* out;                     // h forward, grad gates backward; dense, in the order of gates or of grad_h
  void* kept;                    // (N, H, W, 5, h): written forward unless null, read backward
  const void* grad_kept;         // may be null
  void *grad_weight, *grad_h0, *grad_c0;
  int64_t n, hidden, height, width, taps;
  bool channels_last;
  int threads;
};

struct SqueezeArgs {
  bool is_double;
  const void* x;
  void* y;
  int64_t n, c, h, w, factor;  // of the unsqueezed side
  bool space_to_depth, inverse, channels_last;
  int threads;
};

#define GENFAST_DECLARE(ISA)                                \
  namespace ISA {                                           \
  void affine_coupling(const AffineCouplingArgs&);          \
  void affine_coupling_backward(const AffineCouplingArgs&); \
  void actnorm(const ActNormArgs&);                         \
  void actnorm_backward(const ActNormArgs&);                \
  void channel_mix(const ChannelMixArgs&);                  \
  void channel_mix_weight_grad(const ChannelMixArgs&);      \
  void plu_weight(const PluArgs&);                          \
  void plu_weight_backward(const PluArgs&);                 \
  void squeeze(const SqueezeArgs&);                         \
  void pixel_rnn(const PixelRnnArgs&);                      \
  void pixel_rnn_backward(const PixelRnnArgs&);             \
  }

GENFAST_DECLARE(base)
#ifdef GENFAST_X86_LEVELS
GENFAST_DECLARE(v3)
GENFAST_DECLARE(v4)
#endif
#undef GENFAST_DECLARE

}  // namespace genfast
