// Memory that a kernel works in. Where there is none std::bad_alloc is thrown, which pybind11 makes a MemoryError, and what the
// kernel had is freed. Made before a parallel region, since no exception may leave one.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <new>
#ifdef _OPENMP
#include <omp.h>
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
    const size_t elements = count ? size_t(count) : 1;
    data_ = static_cast<T*>(content == kZeros ? calloc(elements, sizeof(T)) : malloc(elements * sizeof(T)));
    if (!data_) throw std::bad_alloc();
  }
  ~Workspace() { free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// As many elements for each thread of a team, whole cache lines apart.
template <class T>
class PerThread {
 public:
  PerThread(int threads, int64_t count)
      : stride_((count + int64_t(128 / sizeof(T)) - 1) / int64_t(128 / sizeof(T)) * int64_t(128 / sizeof(T))),
        all_(threads < 1 ? stride_ : stride_ * threads) {}
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
