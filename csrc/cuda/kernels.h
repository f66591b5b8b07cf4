// What bind_cuda.cpp may call: the argument structs, which Python fills by the names of their fields, and the kernels.
// Pointers are device pointers, to float32 unless they say otherwise; work runs on the stream.
#pragma once

#include <stdint.h>

#include "../fields.h"

namespace genfast {
namespace cuda {

struct PluArgs {
  GENFAST_FIELDS(
      (uintptr_t, stream)
      (bool, log_scale)
      (const int64_t*, perm)
      (const float*, lower, upper, sign_s, log_s, scale, bias)  // scale and bias may be null
      (float*, weight, folded, logdet)
      (const float*, grad_weight, grad_folded, grad_logdet)  // each may be null
      (float*, grad_lower, grad_upper, grad_log_s, grad_scale, grad_bias)
      (float*, workspace)  // backward: (C, C)
      (int64_t*, inverse_perm)  // backward: (C,)
      (int64_t, c, batch, positions)
  )
};

struct PixelProgramArgs {
  GENFAST_FIELDS(
      (uintptr_t, stream)
      (const int32_t*, program)  // Program.code of genfast/programs/pixel_program.py in 32 bits, each panel over all columns
      (const float*, weights)
      (const int64_t*, statics)  // per map: address, strides by image, row and column
      (float*, cache)  // (n, image_floats), zero before the first row, image_floats a multiple of 4
      (int64_t*, images)  // (n, channels, height, width): levels, read and written
      (const float*, uniforms)  // (n, uniforms, height, width)
      (float*, record)  // (n, height, width, record_size): what each pixel was drawn from; null: not kept
      (double*, scratch)  // (n, levels)
      (int64_t*, faults)  // (n): 1 + (row * width + column) * channels + colour where first nothing could be drawn; 0: nowhere
      (int64_t, code, weight_floats)  // how many there are
      (int64_t, image_floats, record_size, n)
      (int32_t, first_row, last_row, given)  // rows below `given` keep their levels
      (float, temperature)
  )
};

struct PixelRnnArgs {
  GENFAST_FIELDS(
      (uintptr_t, stream)
      (bool, diagonal)
      // Forward (taps, depth, h, 4), depth being h rounded up to a multiple of 4; backward (taps reversed, 4h, h).
      (const float*, weight)
      (const float*, gates, h0, c0)  // (N, H, W, 4h); (positions, h) or null
      (const float*, grad_h, grad_kept)  // backward; the second may be null
      (float*, h, kept, dgates)  // kept may be null forward
      (float*, carry)  // (N, positions, h): c forward; dc backward, zeros at first
      (int64_t, n, hidden, depth, height, width, taps)
  )
};

// The degree-ordered engine: what genfast/ops/_cuda_engine_items.py makes of a program of genfast/programs/degree_program.py.
struct DegreeOrderedArgs {
  typedef float Options[9];
  GENFAST_FIELDS(
      (uintptr_t, stream)
      (const int32_t*, item_list)  // LevelItem of autoregressive_inverse.cuh
      (const int32_t*, tables, order)  // rows by unit; which of the caller's inputs stands at each place
      (const float*, weights, statics)  // statics (n, statics_width) may be null
      (const float*, z)  // (n, inputs)
      (float*, x, logdet)  // (n, inputs), (n)
      // Backward; by_value and constant (n, inputs, width) are F and C of the sorted inputs' parameters.
      (const float*, slopes, by_value, constant)  // slopes (n, units)
      (float*, kept)  // (n, units): the cotangents; its first `inputs` columns hold grad_x, sorted
      (float*, scratch)  // for states that do not fit in shared memory, or null
      (int64_t, n, rows, units, statics_width)
      (int32_t, items, inputs, width, given)  // given: the row at which z lies
      (int32_t, transform, bins, tails)
      (bool, inverse, zuko)
      (Options, options)
  )
};

// Each kernel, its arguments `a`, and the op that an error names.
#define GENFAST_KERNELS(K) \
  K(plu_weight, PluArgs, "plu_weight") \
  K(plu_weight_backward, PluArgs, "plu_weight_backward") \
  K(pixel_program, PixelProgramArgs, "pixel_program") \
  K(pixel_rnn, PixelRnnArgs, a.diagonal ? "diagonal_lstm" : "row_lstm") \
  K(pixel_rnn_backward, PixelRnnArgs, a.diagonal ? "diagonal_lstm_backward" : "row_lstm_backward") \
  K(degree_ordered, DegreeOrderedArgs, "autoregressive_inverse") \
  K(degree_ordered_backward, DegreeOrderedArgs, "autoregressive_inverse_backward")

// All return a cudaError_t: 0, or what the launch said.
#define GENFAST_DECLARE(kernel, Args, op) int kernel(const Args& a);
GENFAST_KERNELS(GENFAST_DECLARE)
#undef GENFAST_DECLARE
int degree_ordered_scratch(int64_t n, int64_t rows, int64_t* floats);  // what scratch must hold on this device: 0 is none
const char* failure(int error);  // what it says; the runtime forgets it, or the next launch would report it again

}  // namespace cuda
}  // namespace genfast
