// The pixel program engine: a causal network as a flat list of steps over cached feature maps, run pixel by pixel, in one launch.
//
// Source: the cached sampling of Fast PixelCNN++ (1704.06001) and of nv-wavenet, for any network that
// genfast/sampling/lowering.py can write as steps; what each step means is in csrc/cpu/pixel_program.cpp and in
// pixel_program.cuh, which holds the body. Given the same uniform numbers it draws the images that the CPU's engine draws.
//
// Fused: everything. A block takes a group of images through all rows, the drawing included, so that a pixel costs a barrier
// per dependent step (tens of nanoseconds) in place of a launch per layer (microseconds) and of a copy to the host.
// The feature maps stay in L2; the program lies in shared memory, since the weights stream through L1 and would evict it.
// FLOPs: 2 x Program.multiplications an image, those of one forward pass over live taps.
// Bytes: a pixel reads the weights of its steps once per block, 4 x (their number), from L2, which is the bound: 64 bytes a
// clock and SM. A thread's four columns make the lines whole. Up to 8 images share a block once there are more images than
// SMs, and share these reads. The beginning and the end of a row are products of (row's columns x K) by (K x N), 8 points a
// thread, bound by the FMA rate of one SM; the draw is serial in double, one lane, levels additions.
//
// Compiled for sm_80, sm_90 and sm_100 and emulated on a CPU (tests/kernels/test_pixel_program_cuda.py); not yet run on a GPU.
#include <cuda_runtime.h>

#include "pixel_program.cuh"

namespace genfast {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostImages = 8;             // of a block: the points of a thread's tile
constexpr int64_t kMostCodeBytes = 96 * 1024;  // in shared memory; every architecture from sm_80 on grants it

struct BlockTeam {
  int32_t rank, size;

  static __device__ constexpr int32_t lanes() { return 32; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_warp() const { __syncwarp(); }
  __device__ float exchange(float value, int32_t mask) const { return __shfl_xor_sync(0xffffffffu, value, mask); }
};

__global__ void __launch_bounds__(kThreads, 1) pixel_program_kernel(const PixelProgramArgs a, int64_t group, bool code_is_shared) {
  extern __shared__ int32_t code[];
  if (code_is_shared) {
    for (int64_t i = threadIdx.x; i < a.code; i += kThreads) code[i] = a.program[i];
    __syncthreads();
  }
  const BlockTeam team{int32_t(threadIdx.x), kThreads};
  const int64_t first = blockIdx.x * group, last = first + group < a.n ? first + group : a.n;
  Engine<BlockTeam>(team, a, code_is_shared ? code : a.program, first, last).rows();
}

}  // namespace

int pixel_program(const PixelProgramArgs& a, uintptr_t stream) {
  int device = 0, processors = 1;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t bytes = a.code * int64_t(sizeof(int32_t));
  const bool shared = bytes <= kMostCodeBytes;
  if (!error && shared)
    error = cudaFuncSetAttribute(pixel_program_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error) return error;
  int64_t group = (a.n + processors - 1) / processors;
  if (group > kMostImages) group = kMostImages;
  while (group > 1 && group * a.image_floats > INT32_MAX) --group;  // offsets in a group are 32 bits wide
  pixel_program_kernel<<<unsigned((a.n + group - 1) / group), kThreads, shared ? size_t(bytes) : 0,
                         reinterpret_cast<cudaStream_t>(stream)>>>(a, group, shared);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace genfast
