// The degree-ordered inverse of an autoregressive transformation, all of it in one launch, and the sweep of its backward.
//
// x_i = f(z_i; theta_i(x)), theta_i of a masked network that sees inputs of lower levels; each unit is computed once, in the
// round of its level (MADE 1502.03509, MAF 1705.07057 sec. 3; DESIGN section 8). The program is that of
// genfast/programs/degree_program.py, flattened to items (genfast/ops/_cuda_engine_items.py); the body is autoregressive_inverse.cuh.
// The backward is the same engine on the transposed network, levels from the last to the first: each unit's cotangent once.
//
// A block of 512 threads takes 1 to 32 samples through all rounds, and as many blocks as multiprocessors share the batch.
// The state ([unit][sample]) lies in shared memory, or in global memory where one sample's units take more than that. Warps
// share the rows of an item; lanes share its terms (few samples) or take four samples each (many); sums are exchanged in
// registers. An item's first weights are asked for one item ahead and what its sums are joined with before its terms, so that the
// second cache's latency overlaps other work. Every sum has one order: two runs give the same bits.
//
// Fused: everything, the univariate inverse included; x is read back by no one.
// FLOPs: 2 x (live weights) a sample, those of one pass. Bytes: a block reads each live weight once a group, from the second
// cache; z, x and statics once a sample.
// Bound, by design: the chain of items, about L x (layers + 1), each a barrier, a product's reads of shared memory and its
// shuffles, or the univariate inverse. For D = 64 affine inputs, hidden 512-512 and batch 256 (groups of 2, 128 blocks): 254
// items, 182,088 live weights (0.73 MB a block: 6 us of one multiprocessor's share of the second cache's rate), 93 MFLOP, state
// 9.9 KB a block. Predicted for an H200, not measured: 400 to 500 cycles an item, so 60 to 75 us in place of the launches of 64
// passes.
// Compiled for sm_80, sm_90 and sm_100 (at most 128 registers, 171 without shared memory, no spills) and emulated on a CPU
// (tests/kernels/test_autoregressive_inverse_cuda.py); not yet run on a GPU.
#include <cuda_runtime.h>

#include "autoregressive_inverse.cuh"

namespace genfast {
namespace cuda {
namespace {

// Addresses outside shared memory take more registers.
GENFAST_ANYWHERE constexpr int threads_of(bool scratch) { return (scratch ? kMostWarps / 2 : kMostWarps) * kLanes; }
constexpr int kScratchGroup = 8;  // samples of a block whose state does not fit in shared memory

struct BlockTeam {
  int32_t rank, size;
  __device__ void sync() const { __syncthreads(); }
  __device__ float exchange(float value, int32_t mask) const { return __shfl_xor_sync(0xffffffffu, value, mask); }
};

template <int M, int S, bool kBackward, bool kScratch>
__global__ void __launch_bounds__(threads_of(kScratch), 1) level_kernel(const __grid_constant__ DegreeOrderedArgs a) {
  extern __shared__ float4 shared_state[];
  float* state = reinterpret_cast<float*>(shared_state);
  if (kScratch) state = a.scratch + int64_t(blockIdx.x) * state_floats(a.rows, M * S);
  const BlockTeam team{int32_t(threadIdx.x), threads_of(kScratch)};
  for (int64_t first = int64_t(blockIdx.x) * (M * S); first < a.n; first += int64_t(gridDim.x) * (M * S)) {
    DegreeOrdered<M, S, kBackward, BlockTeam>(team, a, state, first).run();
    team.sync();
  }
}

struct Limits {
  int processors, shared;
};

cudaError_t limits(Limits& found) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error;
}

using Kernel = void (*)(DegreeOrderedArgs);

template <bool kBackward>
Kernel kernel_for(int64_t group) {
  switch (group) {
    case 1: return level_kernel<1, 1, kBackward, false>;
    case 2: return level_kernel<2, 1, kBackward, false>;
    case 4: return level_kernel<4, 1, kBackward, false>;
    case 8: return level_kernel<4, 2, kBackward, false>;
    case 16: return level_kernel<4, 4, kBackward, false>;
    case 32: return level_kernel<4, 8, kBackward, false>;
    default: return level_kernel<4, kScratchGroup / 4, kBackward, true>;
  }
}

int64_t scratch_blocks(int64_t n, const Limits& limit) {
  const int64_t groups = (n + kScratchGroup - 1) / kScratchGroup;
  return groups < limit.processors ? groups : limit.processors;
}

template <bool kBackward>
int launch(const DegreeOrderedArgs& a) {
  Limits limit{};
  cudaError_t error = limits(limit);
  if (error) return error;
  const int64_t group = level_group(a.n, a.rows, limit.processors, limit.shared);
  const Kernel kernel = kernel_for<kBackward>(group);
  int64_t blocks = group ? (a.n + group - 1) / group : scratch_blocks(a.n, limit);
  if (blocks > limit.processors) blocks = limit.processors;
  const size_t bytes = group ? size_t(state_floats(a.rows, group)) * sizeof(float) : 0;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(unsigned(threads_of(group == 0))), config.dynamicSmemBytes = bytes;
  config.stream = reinterpret_cast<cudaStream_t>(a.stream);
  error = cudaLaunchKernelEx(&config, kernel, a);
  return error ? error : cudaGetLastError();
}

}  // namespace

int degree_ordered(const DegreeOrderedArgs& a) { return launch<false>(a); }

int degree_ordered_backward(const DegreeOrderedArgs& a) { return launch<true>(a); }

int degree_ordered_scratch(int64_t n, int64_t rows, int64_t* floats) {
  Limits limit{};
  const cudaError_t error = limits(limit);
  const bool fits = error || level_group(n, rows, limit.processors, limit.shared);
  *floats = fits ? 0 : scratch_blocks(n, limit) * state_floats(rows, kScratchGroup);
  return error;
}

}  // namespace cuda
}  // namespace genfast
