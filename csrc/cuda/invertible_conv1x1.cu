// The C x C matrix of an invertible 1x1 convolution (Glow 1807.03039 sec. 3.2, eq. 10), W = P L (U + diag(sign e^log_s)),
// with the activation norm before it folded in: (W diag s, W b, logdet), and the gradients of all its factors.
//
// C^3 / 3 multiply-adds on C^2 numbers, C of 12 to a few hundred: bound by the latency of launches, which is why one
// launch forward and two backward stand in for the dozen that triu, tril, diag, exp, matmul and sums would take.
// One block per row of the matrix; every sum is by one thread or by a fixed tree, so two runs give the same bits.
#include <cuda_runtime.h>

#include "kernels.h"

namespace genfast {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// The sum over the block's threads, in every thread.
__device__ float block_sum(float value) {
  __shared__ float partial[kThreads];
  partial[threadIdx.x] = value;
  __syncthreads();
  for (int width = kThreads / 2; width; width /= 2) {
    if (threadIdx.x < width) partial[threadIdx.x] += partial[threadIdx.x + width];
    __syncthreads();
  }
  const float total = partial[0];
  __syncthreads();
  return total;
}

// (U + diag)[k, j]
__device__ float right(const PluArgs& a, int64_t k, int64_t j) {
  if (j > k) return a.upper[k * a.c + j];
  return j == k ? a.sign_s[k] * expf(a.log_s[k]) : 0.f;
}

// L[i, k]
__device__ float left(const PluArgs& a, int64_t i, int64_t k) {
  if (k < i) return a.lower[i * a.c + k];
  return k == i ? 1.f : 0.f;
}

// (L (U + diag))[i, j]
__device__ float product(const PluArgs& a, int64_t i, int64_t j) {
  float total = 0.f;
  for (int64_t k = 0; k <= (i < j ? i : j); ++k) total += left(a, i, k) * right(a, k, j);
  return total;
}

__device__ float norm_scale(const PluArgs& a, int64_t j) {
  if (!a.scale) return 1.f;
  return a.log_scale ? expf(a.scale[j]) : a.scale[j];
}

// Block i < C makes row i of the weight; block C makes the log-determinant.
__global__ void forward(PluArgs a) {
  const int64_t i = blockIdx.x;
  if (i == a.c) {
    float unit = 0.f;
    for (int64_t j = threadIdx.x; j < a.c; j += kThreads) {
      unit += a.log_s[j];
      if (a.scale) unit += a.log_scale ? a.scale[j] : logf(fabsf(a.scale[j]));
    }
    unit = block_sum(unit);
    for (int64_t n = threadIdx.x; n < a.batch; n += kThreads) a.logdet[n] = float(a.positions) * unit;
    return;
  }
  float folded = 0.f;
  for (int64_t j = threadIdx.x; j < a.c; j += kThreads) {
    const float w = product(a, a.perm[i], j);
    if (a.bias) folded += w * a.bias[j];
    a.weight[i * a.c + j] = w * norm_scale(a, j);
  }
  folded = block_sum(folded);
  if (threadIdx.x == 0) a.folded[i] = folded;
}

// The unscaled weight into the workspace, and the inverse permutation.
__global__ void backward_prepare(PluArgs a) {
  const int64_t i = blockIdx.x;
  for (int64_t j = threadIdx.x; j < a.c; j += kThreads) a.workspace[i * a.c + j] = product(a, a.perm[i], j);
  if (threadIdx.x == 0) a.inverse_perm[a.perm[i]] = i;
}

// Gradient of L (U + diag) at [r, j].
__device__ float grad_product(const PluArgs& a, int64_t r, int64_t j) {
  const int64_t i = a.inverse_perm[r];
  float d = a.grad_weight ? a.grad_weight[i * a.c + j] * norm_scale(a, j) : 0.f;
  if (a.bias && a.grad_folded) d += a.grad_folded[i] * a.bias[j];
  return d;
}

// Block r makes row r of grad lower and grad upper, and entry r of the vectors.
__global__ void backward(PluArgs a) {
  const int64_t r = blockIdx.x;
  float g = 0.f;
  if (a.grad_logdet)
    for (int64_t n = threadIdx.x; n < a.batch; n += kThreads) g += a.grad_logdet[n];
  g = float(a.positions) * block_sum(g);
  for (int64_t j = threadIdx.x; j < a.c; j += kThreads) {
    float lower = 0.f, upper = 0.f;
    if (j < r)
      for (int64_t k = j; k < a.c; ++k) lower += grad_product(a, r, k) * right(a, j, k);
    if (j >= r)
      for (int64_t i = r; i < a.c; ++i) upper += left(a, i, r) * grad_product(a, i, j);
    a.grad_lower[r * a.c + j] = lower;
    a.grad_upper[r * a.c + j] = j > r ? upper : 0.f;
    if (j == r) a.grad_log_s[r] = upper * right(a, r, r) + g;
  }
  float scale = 0.f, bias = 0.f;
  for (int64_t i = threadIdx.x; i < a.c; i += kThreads) {
    const float w = a.workspace[i * a.c + r];
    if (a.grad_weight) scale += a.grad_weight[i * a.c + r] * w;
    if (a.grad_folded) bias += a.grad_folded[i] * w;
  }
  scale = block_sum(scale);
  bias = block_sum(bias);
  if (threadIdx.x) return;
  if (a.scale) a.grad_scale[r] = a.log_scale ? scale * norm_scale(a, r) + g : scale + g / a.scale[r];
  if (a.bias) a.grad_bias[r] = bias;
}

}  // namespace

int plu_weight(const PluArgs& a) {
  forward<<<unsigned(a.c + 1), kThreads, 0, reinterpret_cast<cudaStream_t>(a.stream)>>>(a);
  return cudaGetLastError();
}

int plu_weight_backward(const PluArgs& a) {
  const cudaStream_t s = reinterpret_cast<cudaStream_t>(a.stream);
  backward_prepare<<<unsigned(a.c), kThreads, 0, s>>>(a);
  backward<<<unsigned(a.c), kThreads, 0, s>>>(a);
  return cudaGetLastError();
}

const char* failure(int error) {
  cudaGetLastError();
  return cudaGetErrorString(cudaError_t(error));
}

}  // namespace cuda
}  // namespace genfast
