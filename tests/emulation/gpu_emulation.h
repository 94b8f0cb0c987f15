// The CUDA of csrc/gpu.cuh on the processor, to test kernels without a GPU: launch() runs the grid to its end. Each
// thread is a fiber; a seeded scheduler interleaves the warps of all resident blocks, so that a missing barrier or an
// assumed order shows under some seed. What hardware leaves undefined becomes an std::runtime_error out of launch(), or
// NaN: shared memory starts as 0xFF bytes, and so is the target of a copy that has not been waited for.
//
// Not shown: a missing fence (all memory is coherent here) and a global access out of bounds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <sys/mman.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(16) int4 {
  int x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

using std::max;
using std::min;

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

// Hidden, here and below: each library that a test loads has an emulator of its own.
#pragma GCC visibility push(hidden)

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

struct Settings {
  uint64_t seed = 0;
  unsigned resident_blocks = 64;
  int multiprocessors = 4;
  int shared_memory_limit = 227 << 10;
};

inline Settings settings;
inline uint64_t launches = 0;
inline std::map<const void*, int> opted_in_shared_memory;  // by kernel

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t STACK_STRIDE = STACK_BYTES + 320;  // a power of two would put all stacks into the same cache sets
constexpr uint64_t STACK_END = 0x5ca1ab1e0ddba11;
constexpr size_t SHARED_MARGIN = 4096;  // behind a block's shared memory, must stay as it was
constexpr size_t DEFAULT_SHARED_MEMORY = 48 << 10;
constexpr unsigned WARP = 32;

// Continues where `to` was left and keeps in `from` where this was left. To the compiler it may do anything: noipa.
__attribute__((naked, noipa)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

class StackPool {
 public:
  unsigned char* take() {
    if (free_.empty()) {
      constexpr size_t COUNT = 256;
      void* memory = mmap(nullptr, COUNT * STACK_STRIDE, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      for (size_t i = COUNT; i-- > 0;) free_.push_back(static_cast<unsigned char*>(memory) + i * STACK_STRIDE);
    }
    unsigned char* stack = free_.back();
    free_.pop_back();
    return stack;
  }

  void give_back(unsigned char* stack) { free_.push_back(stack); }

 private:
  std::vector<unsigned char*> free_;
};

inline StackPool stacks;

using Perform = void (*)(void* const* lanes);  // [WARP], null for a lane that takes no part

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t group;
};

struct Warp;

struct Fiber {
  Warp* warp;
  unsigned thread, lane;
  unsigned char* stack;
  void* stack_pointer;
  const char* waits_at;
  // The warp's operation that it waits at.
  Perform perform;
  unsigned mask;
  void* operands;
  // cp.async
  std::deque<Copy> copies;
  size_t groups;
};

struct Block;

struct Warp {
  Block* block;
  Fiber* lanes;
  unsigned live = 0, ready = 0, in_warp = 0, in_block = 0;  // sets of lanes: not ended, and what each of them waits for
  bool listed = false;
  uint64_t rank = 0;
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned char* shared;
  unsigned live, arrived = 0, trues = 0, result = 0;
  const char* barrier = nullptr;
};

class Grid {
 public:
  Grid(dim3 grid, unsigned threads, size_t shared_bytes, std::function<void()> kernel)
      : shared_bytes_(shared_bytes), grid_(grid), threads_(threads), kernel_(std::move(kernel)) {
    random_ = (settings.seed + 1) * 0x9e3779b97f4a7c15;
    skewed_ = settings.seed % 2;
  }

  ~Grid() {
    for (auto& block : resident_) release(*block);
  }

  void run();

  unsigned below(unsigned n) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return static_cast<unsigned>((random_ >> 32) * n >> 32);
  }

  // Of the running fiber.
  Block& block() const { return *current_->warp->block; }
  Fiber& fiber() const { return *current_; }
  size_t shared_bytes() const { return shared_bytes_; }

  // Lets other lanes or warps go first; comes back when this one is ready and chosen.
  void give_way() {
    Fiber& self = *current_;
    Warp& warp = *self.warp;
    if (!warp.ready || !below(16)) return switch_stack(&self.stack_pointer, scheduler_);
    const unsigned start = below(4) ? (self.lane + 1) % WARP : below(WARP);
    const unsigned rotated = warp.ready >> start | warp.ready << (-start % WARP);
    Fiber& next = warp.lanes[(start + __builtin_ctz(rotated)) % WARP];
    if (&next == &self) return;
    enter(next);
    switch_stack(&self.stack_pointer, next.stack_pointer);
  }

  // One operation of all lanes that `mask` names and that have not ended; the last to come performs it.
  void in_warp(const char* name, unsigned mask, void* operands, Perform perform) {
    Fiber& self = *current_;
    Warp& warp = *self.warp;
    if (!(mask >> self.lane & 1)) fail(std::string(name) + " by a lane that its own mask does not name");
    self.waits_at = name;
    self.perform = perform;
    self.mask = mask;
    self.operands = operands;
    warp.ready &= ~(1u << self.lane);
    warp.in_warp |= 1u << self.lane;
    if (!perform_for(self) || !below(4)) give_way();
  }

  // The number of threads with a predicate that holds.
  unsigned in_block(const char* name, bool predicate) {
    Fiber& self = *current_;
    Block& block = *self.warp->block;
    if (block.arrived && block.barrier != name) {
      fail(std::string(name) + " while other threads of the block wait at " + block.barrier);
    }
    self.waits_at = block.barrier = name;
    self.warp->ready &= ~(1u << self.lane);
    self.warp->in_block |= 1u << self.lane;
    ++block.arrived;
    block.trues += predicate;
    open_barrier(block);
    give_way();
    return block.result;
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(name(block()) + ", thread " + std::to_string(current_->thread) + ": " + what);
  }

 private:
  static void start();

  static std::string name(const Block& block) {
    return "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ")";
  }

  void enter(Fiber& fiber) {
    current_ = &fiber;
    threadIdx.x = fiber.thread;
    blockIdx = fiber.warp->block->index;
  }

  bool perform_for(const Fiber& fiber) {
    Warp& warp = *fiber.warp;
    const unsigned needed = fiber.mask & warp.live;
    if (needed & ~warp.in_warp) return false;
    void* operands[WARP] = {};
    for (unsigned lane = 0; lane < WARP; ++lane) {
      if (!(needed >> lane & 1)) continue;
      const Fiber& other = warp.lanes[lane];
      if (other.perform != fiber.perform || other.mask != fiber.mask) {
        fail(std::string("the warp diverged: lane ") + std::to_string(fiber.lane) + " at " + fiber.waits_at +
             ", lane " + std::to_string(lane) + " at " + other.waits_at);
      }
      operands[lane] = other.operands;
    }
    fiber.perform(operands);
    warp.in_warp &= ~needed;
    warp.ready |= needed;
    return true;
  }

  void open_barrier(Block& block) {
    if (!block.arrived || block.arrived < block.live) return;
    block.result = block.trues;
    block.arrived = block.trues = 0;
    for (Warp& warp : block.warps) {
      warp.ready |= warp.in_block;
      warp.in_block = 0;
      list(warp);
    }
  }

  // A thread that has ended counts as one that has come.
  void end_thread() {
    Fiber& self = *current_;
    Warp& warp = *self.warp;
    warp.live &= ~(1u << self.lane);
    warp.ready &= ~(1u << self.lane);
    --warp.block->live;
    for (unsigned waiting = warp.in_warp; waiting; waiting &= waiting - 1) {
      const unsigned lane = __builtin_ctz(waiting);
      if (warp.in_warp >> lane & 1) perform_for(warp.lanes[lane]);
    }
    open_barrier(*warp.block);
  }

  void list(Warp& warp) {
    if (warp.listed || !warp.ready) return;
    warp.listed = true;
    runnable_.push_back(&warp);
  }

  void start_block();
  void retire(Block& block);

  void release(Block& block) {
    for (Fiber& fiber : block.fibers) stacks.give_back(fiber.stack);
    std::free(block.shared);
  }

  [[noreturn]] void report_deadlock() const {
    const Block& block = *resident_.front();
    std::map<std::string, int> counts;
    for (const Warp& warp : block.warps) {
      for (unsigned waiting = warp.in_warp | warp.in_block; waiting; waiting &= waiting - 1) {
        ++counts[warp.lanes[__builtin_ctz(waiting)].waits_at];
      }
    }
    std::string message = name(block) + " is stuck:";
    for (const auto& [place, count] : counts) message += " " + std::to_string(count) + " threads at " + place + ",";
    throw std::runtime_error(message + " " + std::to_string(threads_ - block.live) + " ended");
  }

  size_t shared_bytes_;
  dim3 grid_;
  unsigned threads_;
  std::function<void()> kernel_;
  uint64_t random_;
  bool skewed_;  // always the first of the runnable warps by a random rank, where else any of them
  uint64_t started_ = 0;
  std::vector<std::unique_ptr<Block>> resident_;
  std::vector<Warp*> runnable_;
  Fiber* current_ = nullptr;
  void* scheduler_ = nullptr;
  std::exception_ptr error_;
};

inline Grid* grid = nullptr;  // the running one
inline std::mutex one_grid_at_a_time;

inline void Grid::start() {
  try {
    grid->kernel_();
    grid->end_thread();
  } catch (...) {
    grid->error_ = std::current_exception();
  }
  switch_stack(&grid->current_->stack_pointer, grid->scheduler_);
  __builtin_unreachable();
}

inline void Grid::start_block() {
  resident_.push_back(std::make_unique<Block>());
  Block& block = *resident_.back();
  block.index.x = static_cast<unsigned>(started_ % grid_.x);
  block.index.y = static_cast<unsigned>(started_ / grid_.x);
  ++started_;
  const size_t bytes = (shared_bytes_ + SHARED_MARGIN + 1023) & ~size_t{1023};
  block.shared = static_cast<unsigned char*>(std::aligned_alloc(1024, bytes));
  std::memset(block.shared, 0xFF, bytes);
  block.live = threads_;
  block.fibers.resize(threads_);
  block.warps.resize((threads_ + WARP - 1) / WARP);
  const uint64_t rank = uint64_t{below(1 << 16)} << 32;
  for (unsigned thread = 0; thread < threads_; ++thread) {
    Fiber& fiber = block.fibers[thread];
    Warp& warp = block.warps[thread / WARP];
    fiber.thread = thread;
    fiber.lane = thread % WARP;
    fiber.warp = &warp;
    fiber.stack = stacks.take();
    std::memcpy(fiber.stack, &STACK_END, sizeof STACK_END);
    // As switch_stack leaves a stack: six registers, where to return, and the caller's frame, aligned as a call has it.
    auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack) + STACK_BYTES) & ~uintptr_t{15});
    std::memset(top - 8, 0, 8 * sizeof *top);
    top[-2] = reinterpret_cast<void*>(&Grid::start);
    fiber.stack_pointer = top - 8;
    warp.live |= 1u << fiber.lane;
  }
  for (Warp& warp : block.warps) {
    warp.block = &block;
    warp.lanes = block.fibers.data() + (&warp - block.warps.data()) * WARP;
    warp.rank = rank + below(1 << 16);
    warp.ready = warp.live;
    list(warp);
  }
}

inline void Grid::retire(Block& block) {
  for (const Fiber& fiber : block.fibers) {
    if (std::memcmp(fiber.stack, &STACK_END, sizeof STACK_END)) throw std::runtime_error("stack overflow of a thread");
  }
  for (size_t i = 0; i < SHARED_MARGIN; ++i) {
    if (block.shared[shared_bytes_ + i] != 0xFF) {
      throw std::runtime_error(name(block) + " wrote past its shared memory, at byte " +
                               std::to_string(shared_bytes_ + i) + " of " + std::to_string(shared_bytes_));
    }
  }
  for (size_t i = 0; i < resident_.size(); ++i) {
    if (resident_[i].get() != &block) continue;
    release(block);
    std::swap(resident_[i], resident_.back());
    resident_.pop_back();
    break;
  }
}

inline void Grid::run() {
  const uint64_t blocks = uint64_t{grid_.x} * grid_.y;
  for (;;) {
    while (started_ < blocks && (resident_.empty() || resident_.size() < settings.resident_blocks)) start_block();
    if (resident_.empty()) return;
    if (runnable_.empty()) report_deadlock();
    size_t chosen = below(static_cast<unsigned>(runnable_.size()));
    if (skewed_) {
      if (!below(64)) runnable_[chosen]->rank = uint64_t{below(1 << 16)} << 32;
      for (size_t i = 0; i < runnable_.size(); ++i) {
        if (runnable_[i]->rank < runnable_[chosen]->rank) chosen = i;
      }
    }
    Warp& warp = *runnable_[chosen];
    unsigned lane = below(WARP);
    while (!(warp.ready >> lane & 1)) lane = (lane + 1) % WARP;
    enter(warp.lanes[lane]);
    switch_stack(&scheduler_, current_->stack_pointer);
    if (error_) std::rethrow_exception(error_);
    // Within a slice the warp does not change, and others are only added behind.
    if (!warp.ready) {
      warp.listed = false;
      runnable_[chosen] = runnable_.back();
      runnable_.pop_back();
    }
    if (!warp.block->live) retire(*warp.block);
  }
}

inline void run(const void* kernel, dim3 dimensions, unsigned threads, size_t shared_bytes,
                std::function<void()> body) {
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  if (!threads || threads > 1024 || !dimensions.x || !dimensions.y || dimensions.y > 65535 || dimensions.z != 1) {
    throw std::runtime_error("invalid configuration argument");
  }
  if (shared_bytes > DEFAULT_SHARED_MEMORY && shared_bytes > size_t(opted_in_shared_memory[kernel])) {
    throw std::runtime_error("invalid argument");
  }
  blockDim = dim3(threads);
  gridDim = dimensions;
  Grid running(dimensions, threads, shared_bytes, std::move(body));
  grid = &running;
  running.run();
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source) {
  struct Lane {
    T value, result;
    unsigned source;
  } lane{value, value, source};
  grid->in_warp(name, mask, &lane, [](void* const* lanes) {
    for (unsigned i = 0; i < WARP; ++i) {
      auto* to = static_cast<Lane*>(lanes[i]);
      if (!to) continue;
      const auto* from = static_cast<const Lane*>(lanes[to->source]);
      if (!from) grid->fail("a shuffle from lane " + std::to_string(to->source) + ", which takes no part");
      to->result = from->value;
    }
  });
  return lane.result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::grid->in_block("__syncthreads", false); }
inline int __syncthreads_or(int predicate) { return emulation::grid->in_block("__syncthreads_or", predicate) != 0; }
inline int __syncthreads_count(int predicate) {
  return static_cast<int>(emulation::grid->in_block("__syncthreads_count", predicate));
}

inline void __syncwarp(unsigned mask = ~0u) {
  emulation::grid->in_warp("__syncwarp", mask, &mask, [](void* const*) {});
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Lane {
    bool predicate;
    unsigned result;
  } lane{predicate != 0, 0};
  emulation::grid->in_warp("__ballot_sync", mask, &lane, [](void* const* lanes) {
    unsigned result = 0;
    for (unsigned i = 0; i < emulation::WARP; ++i) {
      if (lanes[i] && static_cast<Lane*>(lanes[i])->predicate) result |= 1u << i;
    }
    for (unsigned i = 0; i < emulation::WARP; ++i) {
      if (lanes[i]) static_cast<Lane*>(lanes[i])->result = result;
    }
  });
  return lane.result;
}

// The lanes of a shuffle are taken `width` at a time; past their end a lane gets its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = threadIdx.x % emulation::WARP;
  return emulation::shuffle("__shfl_sync", mask, value, (lane & -width) + (source & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned lane = threadIdx.x % emulation::WARP, other = lane ^ lanes;
  return emulation::shuffle("__shfl_xor_sync", mask, value, other < (lane & -width) + width ? other : lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const unsigned lane = threadIdx.x % emulation::WARP;
  return emulation::shuffle("__shfl_up_sync", mask, value, (lane & (width - 1)) >= lanes ? lane - lanes : lane);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline void __threadfence() { emulation::grid->give_way(); }

template <class T>
T atomicAdd(T* address, T value) {
  emulation::grid->give_way();
  const T before = *address;
  *address = before + value;
  return before;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidValue : cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulation::settings.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulation::settings.shared_memory_limit; break;
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute /*dynamic shared memory*/, int bytes) {
  if (bytes > emulation::settings.shared_memory_limit) return cudaErrorInvalidValue;
  emulation::opted_in_shared_memory[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

namespace reflective {

inline unsigned char* shared_memory() { return emulation::grid->block().shared; }

// Lands when it is waited for, not before; until then its target is NaN.
inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  emulation::Grid& grid = *emulation::grid;
  const size_t offset = static_cast<unsigned char*>(shared) - shared_memory();
  if (offset > grid.shared_bytes() || grid.shared_bytes() - offset < 16) {
    grid.fail("cp.async to byte " + std::to_string(static_cast<ptrdiff_t>(offset)) + " of " +
              std::to_string(grid.shared_bytes()) + " of shared memory");
  }
  if (offset % 16) grid.fail("cp.async to shared memory that is not aligned to 16 bytes");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16) {
    grid.fail("cp.async from global memory that is not aligned to 16 bytes");
  }
  std::memset(shared, 0xFF, 16);
  emulation::Fiber& fiber = grid.fiber();
  fiber.copies.push_back({shared, valid ? global : nullptr, fiber.groups});
}

inline void copy_async_commit() { ++emulation::grid->fiber().groups; }

template <int N>
void copy_async_wait() {
  emulation::Fiber& fiber = emulation::grid->fiber();
  for (auto& copies = fiber.copies; !copies.empty() && copies.front().group + N < fiber.groups; copies.pop_front()) {
    const auto& copy = copies.front();
    if (copy.from) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
}

inline float to_float(float x) { return x; }

inline float to_float(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((x.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000;
  bits |= (x.bits & 0x8000u) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace emulated {

template <class T>
float half_of(uint32_t pair, bool high) {
  return to_float(T{static_cast<uint16_t>(high ? pair >> 16 : pair)});
}

// Of a product that is exact in T and not subnormal.
inline uint16_t exact_bits(float value, Bfloat16) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

inline uint16_t exact_bits(float value, Float16) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = bits >> 16 & 0x8000;
  if (value != value) return sign | 0x7fff;
  return value == 0 ? sign : static_cast<uint16_t>(sign | ((bits & 0x7fffffff) - (112 << 23)) >> 13);
}

}  // namespace emulated

template <class T>
uint32_t multiply_pairs(uint32_t x, uint32_t y) {
  using namespace emulated;
  const uint16_t low = exact_bits(half_of<T>(x, false) * half_of<T>(y, false), T{});
  const uint16_t high = exact_bits(half_of<T>(x, true) * half_of<T>(y, true), T{});
  return uint32_t{high} << 16 | low;
}

inline uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15, byte = bytes >> (nibble & 7) * 8 & 0xff;
    result |= (nibble < 8 ? byte : byte >> 7 ? 0xff : 0) << 8 * i;
  }
  return result;
}

// The sum of a row of a times a column of b and d, rounded once.
template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } lane{d, a, b};
  emulation::grid->in_warp("mma", ~0u, &lane, [](void* const* lanes) {
    float rows[16][16], columns[8][16];
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) emulation::grid->fail("mma by a warp of which threads are missing");
      const auto& lane = *static_cast<const Lane*>(lanes[i]);
      const int g = i / 4, t = i % 4;
      for (int j = 0; j < 8; ++j) {
        const int row = g + (j / 2 % 2) * 8, k = 2 * t + j % 2 + j / 4 * 8;
        rows[row][k] = emulated::half_of<T>(lane.a[j / 2], j % 2);
      }
      for (int j = 0; j < 4; ++j) columns[g][2 * t + j % 2 + j / 2 * 8] = emulated::half_of<T>(lane.b[j / 2], j % 2);
    }
    for (int i = 0; i < 32; ++i) {
      float* d = static_cast<const Lane*>(lanes[i])->d;
      for (int j = 0; j < 4; ++j) {
        const float* row = rows[i / 4 + j / 2 * 8];
        const float* column = columns[i % 4 * 2 + j % 2];
        double sum = d[j];
        for (int k = 0; k < 16; ++k) sum += double{row[k]} * column[k];
        d[j] = static_cast<float>(sum);
      }
    }
  });
}

template <int THREADS>
void meet() {
  if (THREADS != blockDim.x) throw std::runtime_error("meet: not the block's number of threads");
  __syncthreads();
}


// Lane i names a row of 16 bytes: row i % 8 of matrix i / 8. Each gets, of each matrix, pair lane % 4 of row lane / 4.
inline void load_matrices(uint32_t (&words)[4], const void* row) {
  struct Lane {
    uint32_t* words;
    const void* row;
  } lane{words, row};
  emulation::grid->in_warp("ldmatrix", ~0u, &lane, [](void* const* lanes) {
    const void* rows[32];
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) emulation::grid->fail("ldmatrix by a warp of which threads are missing");
      rows[i] = static_cast<const Lane*>(lanes[i])->row;
      if (reinterpret_cast<uintptr_t>(rows[i]) % 16) emulation::grid->fail("ldmatrix of a row that is not aligned");
    }
    for (int i = 0; i < 32; ++i) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const char* row = static_cast<const char*>(rows[8 * matrix + i / 4]);
        std::memcpy(static_cast<const Lane*>(lanes[i])->words + matrix, row + i % 4 * 4, 4);
      }
    }
  });
}

inline float power_of_two(float x) { return std::exp2(x); }

inline float quotient(float x, float y) { return x / y; }

inline unsigned arrive(unsigned* counter) {
  const unsigned before = atomicAdd(counter, 1u);
  emulation::grid->give_way();
  return before;
}

template <class T>
T load_fresh(const T* address) {
  emulation::grid->give_way();
  return *address;
}

template <unsigned CLUSTER = 1, class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, unsigned block, size_t shared_bytes, cudaStream_t, A... arguments) {
  const std::tuple<P...> parameters(static_cast<P>(arguments)...);
  ++emulation::launches;
  emulation::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                 [&] { std::apply(kernel, parameters); });
}

}  // namespace reflective

#pragma GCC visibility pop

// For a test, through ctypes: of the library it belongs to.
extern "C" __attribute__((used, visibility("default"))) inline void emulate(uint64_t seed, unsigned resident_blocks,
                                                                            int multiprocessors,
                                                                            int shared_memory_limit) {
  emulation::settings = {seed, resident_blocks, multiprocessors, shared_memory_limit};
}

// Of this library, until now.
extern "C" __attribute__((used, visibility("default"))) inline uint64_t launches() { return emulation::launches; }
