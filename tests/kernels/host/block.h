// Blocks of a kernel's body on a CPU. A block's threads take turns on one thread, each on a stack of its own: one runs until it
// must wait, then the next. Their order within a turn can be reversed, which shows what two of them do to the same memory
// without a barrier between.
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

namespace host {

constexpr size_t kStack = 128 * 1024;

struct Barrier {
  int waiting = 0;
  int64_t turn = 0;
};

struct Block {
  int warps, lanes;
  ucontext_t scheduler;
  std::vector<ucontext_t> threads;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<bool> done;
  Barrier all;
  std::vector<Barrier> warp;
  std::vector<float> given[2];  // to exchange; of two in turn, so that one barrier does
  std::vector<int> exchanges;
  int64_t progress = 0;
  std::function<void(int)> body;

  int size() const { return warps * lanes; }

  void wait(Barrier& b, int members, int rank) {
    const int64_t turn = b.turn;
    if (++b.waiting == members) {
      b.waiting = 0;
      ++b.turn, ++progress;
    }
    do swapcontext(&threads[size_t(rank)], &scheduler);
    while (b.turn == turn);
  }
};

inline Block* block;
inline int running;

struct Team {
  int32_t rank, size;

  int32_t lanes() const { return block->lanes; }
  void sync() const { block->wait(block->all, size, rank); }
  void sync_warp() const { block->wait(block->warp[size_t(rank / lanes())], lanes(), rank); }
  float exchange(float value, int32_t mask) const {
    std::vector<float>& given = block->given[++block->exchanges[size_t(rank)] & 1];
    given[size_t(rank)] = value;
    sync_warp();
    return given[size_t(rank ^ mask)];
  }
};

inline void thread() {
  const int rank = running;
  block->body(rank);
  block->done[size_t(rank)] = true;
  ++block->progress;
  swapcontext(&block->threads[size_t(rank)], &block->scheduler);
}

// body(rank) for all threads. Whether all came to the end; they do not where some wait for others that never come.
inline bool run(int warps, int lanes, bool backwards, std::function<void(int)> body) {
  Block made{};
  block = &made;
  made.warps = warps, made.lanes = lanes, made.body = std::move(body);
  const size_t size = size_t(made.size());
  made.threads.resize(size), made.done.resize(size), made.warp.resize(size_t(warps)), made.exchanges.resize(size);
  made.given[0].resize(size), made.given[1].resize(size);
  for (size_t i = 0; i < size; ++i) {
    made.stacks.emplace_back(new char[kStack]);
    getcontext(&made.threads[i]);
    made.threads[i].uc_stack.ss_sp = made.stacks[i].get();
    made.threads[i].uc_stack.ss_size = kStack;
    makecontext(&made.threads[i], thread, 0);
  }
  for (size_t left = size; left;) {
    const int64_t before = made.progress;
    left = 0;
    for (size_t i = 0; i < size; ++i) {
      running = int(backwards ? size - 1 - i : i);
      if (!made.done[size_t(running)]) swapcontext(&made.scheduler, &made.threads[size_t(running)]);
      left += !made.done[size_t(running)];
    }
    if (left && made.progress == before) return false;
  }
  return true;
}

}  // namespace host
