// As much of CUDA as the kernels in csrc/cuda use, on threads of the host: each CUDA thread is one of its own, a block has a
// barrier and a cluster another. For tests of what a kernel computes, where there is no GPU. The source's one declaration of
// dynamic shared memory must be rewritten to `static thread_local float4* shared_rows;` first.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <algorithm>
#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __ldg(address) (*(address))
#define __ldcg(address) (*(address))

using std::max;
using std::min;

struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx;
inline thread_local std::barrier<>*block_barrier, *cluster_barrier;
inline thread_local unsigned rank_in_cluster, cluster_size;
inline thread_local float4* block_memory;
inline int host_processors = 1;  // how many multiprocessors the device claims to have: it decides the size of a cluster
inline unsigned host_cluster;    // the size of the last launch's

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

typedef int cudaError_t;
typedef struct Stream* cudaStream_t;
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? host_processors : 9;
  return 0;
}
inline int cudaGetLastError() { return 0; }
template <class F>
int cudaFuncSetAttribute(F, int, int) {
  return 0;
}

template <class A>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(A), const A& args) {
  const unsigned size = config->numAttrs ? config->attrs->val.clusterDim.x : 1, threads = config->blockDim.x;
  host_cluster = size;
  for (unsigned first = 0; first < config->gridDim.x; first += size) {
    std::barrier<> together(size * threads);
    std::vector<std::unique_ptr<std::barrier<>>> barriers;
    std::vector<std::vector<float4>> memory(size);
    std::vector<std::thread> running;
    for (unsigned b = 0; b < size; ++b) {
      barriers.push_back(std::make_unique<std::barrier<>>(threads));
      memory[b].assign(config->dynamicSmemBytes / sizeof(float4) + 1, float4{NAN, NAN, NAN, NAN});
    }
    for (unsigned b = 0; b < size; ++b)
      for (unsigned t = 0; t < threads; ++t)
        running.emplace_back([&, b, t] {
          threadIdx = dim3(t), blockIdx = dim3(first + b);
          block_barrier = barriers[b].get(), cluster_barrier = &together;
          rank_in_cluster = b, cluster_size = size, block_memory = memory[b].data();
          kernel(args);
        });
    for (std::thread& t : running) t.join();
  }
  return 0;
}
