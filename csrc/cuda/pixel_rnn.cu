// The recurrences of PixelRNN (1601.06759 sec. 3.1, 3.2), one launch for all steps: [o, f, i, g] = act(K * h_{t-1} + gates_t),
// c = f c + i g, h = o tanh(c), where t is a row and its positions the columns, or t = row + column and its positions the rows.
//
// All maps are channels-last: gates (N, H, W, 4h), h (N, H, W, h), kept (N, H, W, 5, h) = o, f, i, g, c.
// One block for each sample, or a cluster of up to eight (sm_90 and later), which share its channels and positions. They meet
// once a step; what one step gives the next passes through its own output in the second cache, and lies in shared memory
// while it is multiplied. A warp computes 32 channels at M positions, and all four gates of them, so that the activations
// and the cell follow in registers; M is 8, or 4 where samples are few and there are multiprocessors for more warps.
// Per position 8 k h^2 FLOPs forward, as many backward (the weight gradient is one product afterwards, by the library),
// against 4 (4 + 5 + 1) h bytes; a step reads K anew from the second cache (16 k h^2 bytes), whose latency bounds small h.
// Every sum has one order, so two runs give the same bits. Not yet run on a GPU.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace genfast {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Which positions a step has, and where they stand in the image.
struct Scan {
  int height, width, pad, positions, steps;
  bool diagonal;
  __host__ __device__ explicit Scan(const PixelRnnArgs& a)
      : height(int(a.height)), width(int(a.width)), diagonal(a.diagonal) {
    pad = diagonal ? 1 : int(a.taps) / 2;
    positions = diagonal ? height : width;
    steps = diagonal ? height + width - 1 : height;
  }
  __device__ int begin(int t) const { return diagonal ? max(0, t - width + 1) : 0; }
  __device__ int end(int t) const { return diagonal ? min(t + 1, height) : width; }
  __device__ bool has(int t, int p) const { return t >= 0 && t < steps && p >= begin(t) && p < end(t); }
  __device__ bool unbegun(int t, int p) const { return diagonal ? p > t : t < 0; }  // whose state is the given one
  __device__ int64_t site(int t, int p) const {
    return diagonal ? int64_t(p) * width + t - p : int64_t(t) * width + p;
  }
  __device__ int64_t sites() const { return int64_t(height) * width; }
};

// This block's place among those of its sample.
struct Team {
  int rank, size;
  __device__ Team() {
#if __CUDA_ARCH__ >= 900
    rank = int(cooperative_groups::this_cluster().block_rank());
    size = int(cooperative_groups::this_cluster().num_blocks());
#else
    rank = 0, size = 1;
#endif
  }
  // Waits for all blocks of the sample; what they wrote to global memory is then to be seen.
  __device__ void meet() const {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
  }
};

__device__ __forceinline__ float logistic(float x) { return 1.f / (1.f + expf(-x)); }

// Where a thread's positions stand in shared memory; those beyond the last repeat it and are not stored.
template <int M>
__device__ __forceinline__ void rows_of(int (&row)[M], int first, int last, int stride) {
#pragma unroll
  for (int m = 0; m < M; ++m) row[m] = min(first + m, last) * stride;
}

extern __shared__ float4 shared_rows[];

template <int M>
__global__ void __launch_bounds__(kThreads) forward(PixelRnnArgs a) {
  float* rows = reinterpret_cast<float*>(shared_rows);
  const Scan scan(a);
  const Team team;
  const int hidden = int(a.hidden), width = int(a.depth), count = (scan.positions + int(a.taps) - 1) * width;
  const int blocks = (hidden + 31) / 32, depth = int(a.taps) * width, lane = threadIdx.x % 32;
  const int64_t sample = blockIdx.x / team.size, origin = sample * scan.sites();
  for (int t = 0; t < scan.steps; ++t) {
    for (int k = threadIdx.x; k < count; k += kThreads) {
      const int p = k / width - scan.pad, q = k % width;
      float value = 0.f;
      if (q < hidden && p >= 0 && p < scan.positions) {
        if (scan.has(t - 1, p))
          value = __ldcg(a.h + (origin + scan.site(t - 1, p)) * hidden + q);
        else if (a.h0 && scan.unbegun(t - 1, p))
          value = a.h0[p * hidden + q];
      }
      rows[k] = value;
    }
    __syncthreads();
    const int begin = scan.begin(t), end = scan.end(t), units = (end - begin + M - 1) / M * blocks;
    for (int unit = team.rank * kWarps + threadIdx.x / 32; unit < units; unit += team.size * kWarps) {
      const int channel = unit % blocks * 32 + lane, ch = min(channel, hidden - 1);
      const int first = begin + unit / blocks * M;
      int row[M];
      rows_of(row, first, scan.positions - 1, width);
      float4 acc[M];
#pragma unroll
      for (int m = 0; m < M; ++m) acc[m] = make_float4(0.f, 0.f, 0.f, 0.f);
      const float4* weight = reinterpret_cast<const float4*>(a.weight) + ch;
      for (int q = 0; q < depth; q += 4) {
        float4 w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = __ldg(weight + int64_t(q + i) * hidden);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const float4 s = *reinterpret_cast<const float4*>(rows + row[m] + q);
          const float part[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            acc[m].x += w[i].x * part[i];
            acc[m].y += w[i].y * part[i];
            acc[m].z += w[i].z * part[i];
            acc[m].w += w[i].w * part[i];
          }
        }
      }
      if (channel >= hidden) continue;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int p = first + m;
        if (p >= end) break;
        const int64_t site = origin + scan.site(t, p), own = (sample * scan.positions + p) * hidden + ch;
        const float* gates = a.gates + site * 4 * hidden + ch;
        float c = 0.f;
        if (!scan.unbegun(t - 1, p))
          c = __ldcg(a.carry + own);
        else if (a.c0)
          c = a.c0[p * hidden + ch];
        const float o = logistic(acc[m].x + gates[0]), f = logistic(acc[m].y + gates[hidden]);
        const float i = logistic(acc[m].z + gates[2 * hidden]), g = tanhf(acc[m].w + gates[3 * hidden]);
        c = f * c + i * g;
        a.carry[own] = c;
        a.h[site * hidden + ch] = o * tanhf(c);
        if (!a.kept) continue;
        float* kept = a.kept + site * 5 * hidden + ch;
        kept[0] = o, kept[hidden] = f, kept[2 * hidden] = i, kept[3 * hidden] = g, kept[4 * hidden] = c;
      }
    }
    team.meet();
  }
}

template <int M>
__global__ void __launch_bounds__(kThreads) backward(PixelRnnArgs a) {
  float* rows = reinterpret_cast<float*>(shared_rows);
  const Scan scan(a);
  const Team team;
  const int hidden = int(a.hidden), width = 4 * hidden, count = (scan.positions + int(a.taps) - 1) * width;
  const int blocks = (hidden + 31) / 32, depth = int(a.taps) * width, lane = threadIdx.x % 32;
  const int64_t sample = blockIdx.x / team.size, origin = sample * scan.sites();
  for (int t = scan.steps - 1; t >= 0; --t) {
    for (int k = threadIdx.x; k < count; k += kThreads) {
      const int p = k / width - (int(a.taps) - 1 - scan.pad), q = k % width;
      rows[k] = scan.has(t + 1, p) ? __ldcg(a.dgates + (origin + scan.site(t + 1, p)) * width + q) : 0.f;
    }
    __syncthreads();
    const int begin = scan.begin(t), end = scan.end(t), units = (end - begin + M - 1) / M * blocks;
    for (int unit = team.rank * kWarps + threadIdx.x / 32; unit < units; unit += team.size * kWarps) {
      const int channel = unit % blocks * 32 + lane, ch = min(channel, hidden - 1);
      const int first = begin + unit / blocks * M;
      int row[M];
      rows_of(row, first, scan.positions - 1, width);
      float dh[M] = {};
      const float* weight = a.weight + ch;
      for (int q = 0; q < depth; q += 4) {
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = __ldg(weight + int64_t(q + i) * hidden);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const float4 s = *reinterpret_cast<const float4*>(rows + row[m] + q);
          dh[m] += w[0] * s.x + w[1] * s.y + w[2] * s.z + w[3] * s.w;
        }
      }
      if (channel >= hidden) continue;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int p = first + m;
        if (p >= end) break;
        const int64_t site = origin + scan.site(t, p), own = (sample * scan.positions + p) * hidden + ch;
        const float* kept = a.kept + site * 5 * hidden + ch;
        const float* extra = a.grad_kept ? a.grad_kept + site * 5 * hidden + ch : nullptr;
        const float o = kept[0], f = kept[hidden], i = kept[2 * hidden], g = kept[3 * hidden], th = tanhf(kept[4 * hidden]);
        float before = 0.f;
        if (!scan.unbegun(t - 1, p))
          before = a.kept[((origin + scan.site(t - 1, p)) * 5 + 4) * hidden + ch];
        else if (a.c0)
          before = a.c0[p * hidden + ch];
        const float d = dh[m] + a.grad_h[site * hidden + ch];
        float dc = __ldcg(a.carry + own) + d * o * (1.f - th * th), d_o = d * th;
        if (extra) dc += extra[4 * hidden], d_o += extra[0];
        float d_f = dc * before, d_i = dc * g, d_g = dc * i;
        if (extra) d_f += extra[hidden], d_i += extra[2 * hidden], d_g += extra[3 * hidden];
        a.carry[own] = dc * f;
        float* out = a.dgates + site * width + ch;
        out[0] = d_o * o * (1.f - o), out[hidden] = d_f * f * (1.f - f);
        out[2 * hidden] = d_i * i * (1.f - i), out[3 * hidden] = d_g * (1.f - g * g);
      }
    }
    team.meet();
  }
}

// As many blocks a sample as there are multiprocessors for, and warps with work for their four schedulers.
int launch(void (*wide)(PixelRnnArgs), void (*narrow)(PixelRnnArgs), const PixelRnnArgs& a, int64_t row_floats) {
  const Scan scan(a);
  const size_t bytes = size_t(scan.positions + a.taps - 1) * size_t(row_floats) * sizeof(float);
  int device = 0, processors = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  const bool few = 8 * a.n <= processors;
  void (*kernel)(PixelRnnArgs) = few ? narrow : wide;
  if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error) return error;
  const int64_t tile = few ? 4 : 8, units = (scan.positions + tile - 1) / tile * ((a.hidden + 31) / 32);
  int size = 1;
  while (major >= 9 && size < 8 && 2 * size * a.n <= processors && 4 * size < units) size *= 2;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(size), cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(a.n * size)), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes, config.stream = reinterpret_cast<cudaStream_t>(a.stream);
  config.attrs = &cluster, config.numAttrs = size > 1 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, a);
  return error ? error : cudaGetLastError();
}

}  // namespace

int pixel_rnn(const PixelRnnArgs& a) { return launch(forward<8>, forward<4>, a, a.depth); }

int pixel_rnn_backward(const PixelRnnArgs& a) { return launch(backward<8>, backward<4>, a, 4 * a.hidden); }

}  // namespace cuda
}  // namespace genfast
