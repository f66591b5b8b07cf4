// The pixel program engine: a causal network as a flat list of steps over cached feature maps, run pixel by pixel, one launch.
//
// Source: the cached sampling of Fast PixelCNN++ (1704.06001) and of nv-wavenet, for any network that
// genfast/sampling/lowering.py can write as steps; what each step means is in csrc/cpu/pixel_program.cpp and in
// pixel_program.cuh, which holds the body. Given the same uniform numbers it draws the images that the CPU's engine draws.
//
// Fused: everything. A block takes a group of images through all rows, the drawing included, so that a dependent step costs a
// barrier in place of a launch, and nothing waits for the host. The feature maps stay in L2; the program lies in shared
// memory, since the weights stream through L1 and would evict it.
// FLOPs: 2 x Program.multiplications an image, those of one forward pass over live taps.
// Bytes: a pixel reads the weights of its steps once per block, 4 x (their number), from L2: the bound, by design, is what one
// SM can read. A thread's four columns make the lines whole. From as many images as SMs on, up to 8 share a block and so these
// reads; with fewer images and enough weights, a cluster of up to 8 blocks (sm_90 and later) shares an image, each of its SMs
// reading a part. The beginning and the end of a row are products of (the row's columns x K) by (K x N), 8 points a thread,
// bound by the FMA rate of these SMs; the draw is serial: one lane adds up the levels, in double.
//
// Predicted for an H200, not yet run on a GPU. One image: a step is a barrier, the way to L2 for features and weights at
// once, 20 exchanges and a store, 500 to 600 cycles (0.35 us; a cluster's barrier adds 0.25 us), plus its weights at 64
// bytes a cycle of each SM. 7 layers of 64 channels, 24 steps: 8 us a pixel. 15 gated layers of 128 channels, 60 steps and
// 5.6 M weights over 8 SMs: 60 us. The naive loop in a CUDA graph takes 2.5 to 3 us a kernel: 100 and 540 us a pixel of 28
// x 28, so 10 to 12 times as long, and more the larger the image and the more kernels a layer has; 50 times needs the
// weights in the memory of more SMs than a cluster has. 1024 images, 8 to an SM: the FMA rate at about 60%, 340 us a pixel
// of the large network, where the naive loop repeats all 784 of them: some 500 times as long in float32, 90 in TF32.
// Compiled for sm_80, sm_90 and sm_100 and emulated on a CPU (tests/kernels/test_pixel_program_cuda.py); not yet run on a GPU.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "pixel_program.cuh"

namespace genfast {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostImages = 8;             // of a block: the points of a thread's tile
constexpr int64_t kMostCodeBytes = 96 * 1024;  // in shared memory; every architecture from sm_80 on grants it
constexpr int64_t kClusterBytes = 1 << 20;     // of weights; with less, a pixel waits for barriers, and a cluster's are slower

struct BlockTeam {
  int32_t rank, size;

  static __device__ constexpr int32_t lanes() { return 32; }
  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if (size > kThreads) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
  }
  __device__ void sync_warp() const { __syncwarp(); }
  __device__ float exchange(float value, int32_t mask) const { return __shfl_xor_sync(0xffffffffu, value, mask); }
};

struct Launch {
  int64_t group;   // images a team takes
  int32_t blocks;  // of a team: 1, or a cluster
  bool code_is_shared;
};

__global__ void __launch_bounds__(kThreads, 1) pixel_program_kernel(const __grid_constant__ PixelProgramArgs a,
                                                                       const Launch launch) {
  extern __shared__ int32_t code[];
  if (launch.code_is_shared) {
    for (int64_t i = threadIdx.x; i < a.code; i += kThreads) code[i] = a.program[i];
    __syncthreads();
  }
  const int32_t blocks = launch.blocks, team = int32_t(blockIdx.x) / blocks, block = int32_t(blockIdx.x) - team * blocks;
  const int64_t first = team * launch.group, last = first + launch.group < a.n ? first + launch.group : a.n;
  Engine<BlockTeam>({block * kThreads + int32_t(threadIdx.x), blocks * kThreads}, a,
                    launch.code_is_shared ? code : a.program, first, last)
      .rows();
}

}  // namespace

int pixel_program(const PixelProgramArgs& a) {
  int device = 0, processors = 1, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  const int64_t bytes = a.code * int64_t(sizeof(int32_t));
  Launch launch{(a.n + processors - 1) / processors, 1, bytes <= kMostCodeBytes};
  if (!error && launch.code_is_shared)
    error = cudaFuncSetAttribute(pixel_program_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error) return error;
  if (launch.group > kMostImages) launch.group = kMostImages;
  while (launch.group > 1 && launch.group * a.image_floats > INT32_MAX) --launch.group;  // offsets in a group are 32 bits wide

  const int64_t teams = (a.n + launch.group - 1) / launch.group;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = launch.code_is_shared ? size_t(bytes) : 0;
  config.stream = reinterpret_cast<cudaStream_t>(a.stream);
  config.attrs = &cluster;
  if (major >= 9 && a.weight_floats * int64_t(sizeof(float)) >= kClusterBytes) {
    for (int32_t blocks = 8; blocks > 1 && launch.blocks == 1; blocks /= 2) {
      int fit = 0;  // clusters at a time; images that had to wait for others would double the time
      cluster.val.clusterDim.x = unsigned(blocks);
      config.gridDim = dim3(unsigned(teams * blocks));
      config.numAttrs = 1;
      if (cudaOccupancyMaxActiveClusters(&fit, pixel_program_kernel, &config))
        cudaGetLastError();  // a device that has no such clusters
      else if (fit >= teams)
        launch.blocks = blocks;
    }
  }
  config.gridDim = dim3(unsigned(teams * launch.blocks));
  config.numAttrs = launch.blocks > 1;
  error = cudaLaunchKernelEx(&config, pixel_program_kernel, a, launch);
  return error ? error : cudaGetLastError();
}

}  // namespace cuda
}  // namespace genfast
