// Memory that a kernel works in. Where there is none std::bad_alloc is thrown, which pybind11 makes a MemoryError, and what the
// kernel had is freed. Made before a parallel region, since no exception may leave one.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef GENFAST_SANITIZED
#include <sanitizer/asan_interface.h>
#include <string.h>
#endif

namespace genfast {
namespace GENFAST_ISA {
namespace {

template <class T>
class Workspace {
 public:
  enum Content { kUninitialised, kZeros };

  explicit Workspace(int64_t count, Content content = kUninitialised) {
    if (count < 0 || count > INT64_MAX / int64_t(sizeof(T)) - 64) throw std::bad_alloc();
#ifdef GENFAST_SANITIZED
    // Without slack at either end, so that the sanitizer sees the first element beyond.
    if (posix_memalign(&block_, 64, size_t(count) * sizeof(T))) throw std::bad_alloc();
    data_ = static_cast<T*>(block_);
    if (content == kZeros) memset(block_, 0, size_t(count) * sizeof(T));
#else
    const size_t bytes = size_t(count) * sizeof(T) + 64;
    block_ = content == kZeros ? calloc(bytes, 1) : malloc(bytes);
    if (!block_) throw std::bad_alloc();
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block_) + 63) & ~uintptr_t(63));
#endif
  }
  ~Workspace() { free(block_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* get() const { return data_; }

 private:
  void* block_;
  T* data_;  // at the start of a cache line
};

// As many elements for each thread of a team, whole cache lines apart.
template <class T>
class PerThread {
 public:
  PerThread(int threads, int64_t count)
      : stride_((count + int64_t(128 / sizeof(T)) - 1) / int64_t(128 / sizeof(T)) * int64_t(128 / sizeof(T))),
        all_(threads < 1 ? stride_ : stride_ * threads) {
#ifdef GENFAST_SANITIZED
    for (int t = 0; t < (threads < 1 ? 1 : threads); ++t)
      ASAN_POISON_MEMORY_REGION(all_.get() + t * stride_ + count, size_t(stride_ - count) * sizeof(T));
#endif
  }
  // Of the thread that calls.
  T* get() const {
#ifdef _OPENMP
    return all_.get() + omp_get_thread_num() * stride_;
#else
    return all_.get();
#endif
  }

 private:
  int64_t stride_;
  Workspace<T> all_;
};

}  // namespace
}  // namespace GENFAST_ISA
}  // namespace genfast
