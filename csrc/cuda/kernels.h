// What bind_cuda.cpp may call. Pointers are device pointers to float32 (perm: int64); work runs on the given stream.
#pragma once

#include <stdint.h>

namespace genfast {
namespace cuda {

struct PluArgs {
  bool log_scale;
  const int64_t* perm;
  const float *lower, *upper, *sign_s, *log_s, *scale, *bias;  // scale and bias may be null
  float *weight, *folded, *logdet;
  const float *grad_weight, *grad_folded, *grad_logdet;  // each may be null
  float *grad_lower, *grad_upper, *grad_log_s, *grad_scale, *grad_bias;
  float* workspace;       // backward: (C, C)
  int64_t* inverse_perm;  // backward: (C,)
  int64_t c, batch, positions;
};

// Both return a cudaError_t: 0, or what the launch said.
int plu_weight(const PluArgs& args, uintptr_t stream);
int plu_weight_backward(const PluArgs& args, uintptr_t stream);
const char* error_string(int error);

}  // namespace cuda
}  // namespace genfast
