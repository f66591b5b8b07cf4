// Refuses memory to one library: tests/without_memory.py preloads this. What is asked for from addresses begin to end is
// counted, and refused from a number of requests on; everybody else gets memory from the C library.
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <new>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {

std::atomic<uintptr_t> first{0}, last{0};
std::atomic<long> requests{0}, granted{LONG_MAX};

bool refused(void* caller) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(caller);
  if (at < first || at >= last || requests++ < granted) return false;
  errno = ENOMEM;
  return true;
}

void* checked(void* memory) {
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

#define CALLER __builtin_return_address(0)

extern "C" {

void refuse_memory(uintptr_t begin, uintptr_t end, long after) {
  requests = 0, granted = after;
  last = end, first = begin;
}

long requests_for_memory() { return requests; }

void* malloc(size_t size) { return refused(CALLER) ? nullptr : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return refused(CALLER) ? nullptr : __libc_calloc(count, size); }
void* realloc(void* memory, size_t size) { return refused(CALLER) ? nullptr : __libc_realloc(memory, size); }
void* memalign(size_t line, size_t size) { return refused(CALLER) ? nullptr : __libc_memalign(line, size); }
void* aligned_alloc(size_t line, size_t size) { return refused(CALLER) ? nullptr : __libc_memalign(line, size); }
int posix_memalign(void** memory, size_t line, size_t size) {
  void* found = refused(CALLER) ? nullptr : __libc_memalign(line, size);
  if (!found) return ENOMEM;
  *memory = found;
  return 0;
}

}  // extern "C"

void* operator new(size_t size) { return checked(refused(CALLER) ? nullptr : __libc_malloc(size ? size : 1)); }
void* operator new[](size_t size) { return checked(refused(CALLER) ? nullptr : __libc_malloc(size ? size : 1)); }
void* operator new(size_t size, std::align_val_t line) {
  return checked(refused(CALLER) ? nullptr : __libc_memalign(size_t(line), size ? size : 1));
}
void* operator new[](size_t size, std::align_val_t line) {
  return checked(refused(CALLER) ? nullptr : __libc_memalign(size_t(line), size ? size : 1));
}
void* operator new(size_t size, const std::nothrow_t&) noexcept { return refused(CALLER) ? nullptr : __libc_malloc(size ? size : 1); }
void* operator new[](size_t size, const std::nothrow_t&) noexcept { return refused(CALLER) ? nullptr : __libc_malloc(size ? size : 1); }
