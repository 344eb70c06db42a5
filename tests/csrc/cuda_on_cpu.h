// As much of CUDA as the kernels of csrc use, on a CPU: what a GPU would run can be run, and stepped through, without
// one.
//
// A block is a thread of the operating system; its 256 threads are contexts that take turns and change at barriers,
// shuffles, votes and products of matrices. `reverse` changes the order of the turns. Shared memory belongs to the
// block: it is __thread. Copies that run beside the threads are made as late as they may be, or, if `eager`, at once.
#pragma once
#define FASTBERT_MEMORY_ORDER_H  // in place of csrc/memory_order.h
#define FASTBERT_MMA_H           // in place of csrc/mma.h

#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#define __device__
#define __global__
#define __grid_constant__
#define __shared__ __thread
#define __launch_bounds__(threads, blocks)

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(8) uint2 { uint32_t x, y; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// ---------------------------------------------------------------- threads

struct Index { unsigned x; };
inline thread_local Index threadIdx;

struct Copy { void* to; const void* from; };  // of 16 bytes; from null: zeros

struct Block {
  static constexpr int kStack = 1 << 17;
  int count = 0, current = 0, left = 0;
  bool reverse = false;
  ucontext_t main;
  std::vector<ucontext_t> contexts;
  std::vector<char> stacks;
  std::vector<bool> done;
  std::function<void()> body;
  // Barriers of the block (index 0) and of its warps: who has come, and how often all have.
  std::vector<int> come = std::vector<int>(64), rounds = std::vector<int>(64);
  struct Wait { int index = 0, round = -1; };
  std::vector<Wait> waits;  // of each thread: the barrier that it came to last, which then had been passed so often
  uint32_t traded[64][32];
  // What the lanes of a warp bring to a matrix instruction, by turns so that one barrier is enough.
  const void* rows[2][64][32];
  float fragments[2][64][32][12];
  std::vector<int> turns;
  // Of each thread: copies not made yet, and of each group of them that is under way how many it has.
  std::vector<std::vector<Copy>> copies;
  std::vector<std::vector<size_t>> groups;
#ifdef __SANITIZE_THREAD__
  std::vector<void*> fibers;
  void* main_fiber;
#else
  struct Jump { jmp_buf at; };
  std::vector<Jump> jumps;
  std::vector<bool> started;
  jmp_buf main_jump;
#endif

#ifdef __SANITIZE_THREAD__
  void enter(int index) {
    __tsan_switch_to_fiber(fibers[index], 0);
    swapcontext(&main, &contexts[index]);
  }

  void leave(int index) {
    __tsan_switch_to_fiber(main_fiber, 0);
    swapcontext(&contexts[index], &main);
  }
#else
  // Only the first time by its context: that asks the system to change the signals, a jump does not.
  void enter(int index) {
    if (_setjmp(main_jump)) return;
    if (started[index]) _longjmp(jumps[index].at, 1);
    started[index] = true;
    setcontext(&contexts[index]);
  }

  void leave(int index) {
    if (!_setjmp(jumps[index].at)) _longjmp(main_jump, 1);
  }
#endif

  void yield() {
    leave(current);
    threadIdx.x = current;
  }

  void barrier(int index, int members) {
    const int round = rounds[index];
    if (++come[index] == members) {
      come[index] = 0;
      ++rounds[index];
    }
    waits[current] = {index, round};
    while (rounds[index] == round) yield();
  }

  void run();
};
inline thread_local Block* block_of_thread;

inline void start_context() {
  Block& block = *block_of_thread;
  threadIdx.x = block.current;
  block.body();
  block.done[block.current] = true;
  --block.left;
  block.leave(block.current);
}

inline void Block::run() {
  block_of_thread = this;
  contexts.resize(count);
  stacks.resize(static_cast<size_t>(count) * kStack);
  done.assign(count, false);
  left = count;
  turns.assign(count, 0);
  waits.resize(count);
  copies.resize(count);
  groups.resize(count);
#ifdef __SANITIZE_THREAD__
  main_fiber = __tsan_get_current_fiber();
  for (int i = 0; i < count; ++i) fibers.push_back(__tsan_create_fiber(0));
#else
  jumps.resize(count);
  started.assign(count, false);
#endif
  for (int i = 0; i < count; ++i) {
    getcontext(&contexts[i]);
    contexts[i].uc_stack.ss_sp = stacks.data() + static_cast<size_t>(i) * kStack;
    contexts[i].uc_stack.ss_size = kStack;
    contexts[i].uc_link = nullptr;
    makecontext(&contexts[i], start_context, 0);
  }
  while (left > 0) {
    for (int turn = 0; turn < count; ++turn) {
      current = reverse ? count - 1 - turn : turn;
      const Wait& wait = waits[current];
      if (!done[current] && rounds[wait.index] != wait.round) enter(current);
    }
    std::this_thread::yield();
  }
#ifdef __SANITIZE_THREAD__
  for (void* const fiber : fibers) __tsan_destroy_fiber(fiber);
#endif
  for (const int waiting : come)
    if (waiting) std::puts("a thread waits at a barrier that the others have left"), std::abort();
}

inline void __syncthreads() { block_of_thread->barrier(0, block_of_thread->count); }
inline void __syncwarp() { block_of_thread->barrier(threadIdx.x / 32 + 1, 32); }
inline void __nanosleep(unsigned) {
  block_of_thread->yield();
  std::this_thread::sleep_for(std::chrono::microseconds(50));  // the processor is for blocks that do not wait
}

inline uint32_t trade(uint32_t value, unsigned from) {
  Block& block = *block_of_thread;
  const int warp = threadIdx.x / 32 + 1;
  block.traded[warp][threadIdx.x % 32] = value;
  block.barrier(warp, 32);
  const uint32_t got = block.traded[warp][from % 32];
  block.barrier(warp, 32);
  return got;
}

inline uint32_t __shfl_sync(unsigned, uint32_t value, int from) { return trade(value, from); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word = trade(word, (threadIdx.x % 32) ^ mask);
  std::memcpy(&value, &word, 4);
  return value;
}
inline double __shfl_xor_sync(unsigned, double value, int mask) {
  uint32_t words[2];
  std::memcpy(words, &value, 8);
  for (uint32_t& word : words) word = trade(word, (threadIdx.x % 32) ^ mask);
  std::memcpy(&value, words, 8);
  return value;
}
inline unsigned __ballot_sync(unsigned, int vote) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= (trade(vote != 0, lane) ? 1u : 0u) << lane;
  return votes;
}

// ---------------------------------------------------------------- memory

inline std::atomic<int>& as_atomic(const int* address) {
  return *reinterpret_cast<std::atomic<int>*>(const_cast<int*>(address));
}
inline int atomicAdd(int* counter, int by) { return as_atomic(counter).fetch_add(by, std::memory_order_relaxed); }
template <class T> T __ldcg(const T* address) { return *address; }
template <class T> T __ldg(const T* address) { return *address; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }

namespace fastbert {
inline int add_acq_rel(int* counter) { return as_atomic(counter).fetch_add(1, std::memory_order_acq_rel); }
inline void add_release(int* counter) { as_atomic(counter).fetch_add(1, std::memory_order_release); }
inline int load_relaxed(const int* address) { return as_atomic(address).load(std::memory_order_relaxed); }
inline int load_acquire(const int* address) { return as_atomic(address).load(std::memory_order_acquire); }
inline void store_release(int* address, int value) { as_atomic(address).store(value, std::memory_order_release); }
inline void fence_acq_rel() { std::atomic_thread_fence(std::memory_order_acq_rel); }
}  // namespace fastbert

// ---------------------------------------------------------------- 16-bit numbers

struct __half2 { _Float16 x, y; };
struct __nv_bfloat162 { uint16_t x, y; };
inline float2 __half22float2(__half2 pair) { return {static_cast<float>(pair.x), static_cast<float>(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {static_cast<_Float16>(x), static_cast<_Float16>(y)}; }
inline float wide(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {wide(pair.x), wide(pair.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {narrow(x), narrow(y)}; }

// ---------------------------------------------------------------- csrc/mma.h

struct Machine { int multiprocessors = 1, shared = 233472; bool reverse = false, eager = false; };
inline Machine machine;

namespace fastbert {
using SharedAddress = char*;
inline SharedAddress shared_address(char* shared) { return shared; }
inline void keep(int&) {}

inline float half_of_word(uint32_t word, int which, bool half) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * which);
  if (!half) return wide(bits);
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return value;
}

inline void load_matrices(uint32_t (&words)[4], const void* row, bool transposed = false) {
  Block& block = *block_of_thread;
  const int warp = threadIdx.x / 32 + 1, lane = threadIdx.x % 32;
  auto& rows = block.rows[block.turns[threadIdx.x]++ % 2][warp];
  if (reinterpret_cast<uintptr_t>(row) % 16) std::puts("a row of a matrix is not aligned"), std::abort();
  rows[lane] = row;
  block.barrier(warp, 32);
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int from = transposed ? lane % 4 * 2 + j : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + j;
      pair[j] = static_cast<const uint16_t*>(rows[i * 8 + from])[column];
    }
    std::memcpy(&words[i], pair, 4);
  }
}
inline void load_transposed(uint32_t (&words)[4], const void* row) { load_matrices(words, row, true); }

template <bool kHalf>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Block& block = *block_of_thread;
  const int warp = threadIdx.x / 32 + 1, lane = threadIdx.x % 32;
  const auto& lanes = block.fragments[block.turns[threadIdx.x] % 2][warp];
  float* const mine = block.fragments[block.turns[threadIdx.x]++ % 2][warp][lane];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) mine[2 * i + j] = half_of_word(a[i], j, kHalf);
  for (int j = 0; j < 2; ++j) mine[8 + j] = half_of_word(b0, j, kHalf), mine[10 + j] = half_of_word(b1, j, kHalf);
  block.barrier(warp, 32);
  for (int i = 0; i < 4; ++i)  // row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2
    for (int k = 0; k < 16; ++k) {
      const float x = lanes[lane / 4 * 4 + k % 8 / 2][2 * (i / 2 + 2 * (k / 8)) + k % 2];
      sums[i] += x * lanes[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2][8 + 2 * (k / 8) + k % 2];
    }
}

inline void make(const Copy& copy) {
  if (copy.from == nullptr) std::memset(copy.to, 0, 16);
  else std::memcpy(copy.to, copy.from, 16);
}
inline void copy_async(void* shared, const void* global, bool real) {
  const Copy copy = {shared, real ? global : nullptr};
  for (const void* address : {static_cast<const void*>(shared), global})
    if (reinterpret_cast<uintptr_t>(address) % 16) std::puts("a copy is not aligned"), std::abort();
  if (machine.eager) make(copy);
  else block_of_thread->copies[threadIdx.x].push_back(copy);
}
inline void commit_copies() {
  size_t before = 0;
  auto& groups = block_of_thread->groups[threadIdx.x];
  for (const size_t group : groups) before += group;
  groups.push_back(block_of_thread->copies[threadIdx.x].size() - before);
}
template <int kGroups>
void wait_copies() {
  auto &groups = block_of_thread->groups[threadIdx.x];
  auto& copies = block_of_thread->copies[threadIdx.x];
  size_t made = 0;
  while (groups.size() > kGroups) {
    made += groups.front();
    groups.erase(groups.begin());
  }
  for (size_t i = 0; i < made; ++i) make(copies[i]);
  copies.erase(copies.begin(), copies.begin() + made);
}
}  // namespace fastbert

// ---------------------------------------------------------------- the runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrReservedSharedMemoryPerBlock
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes { size_t sharedSizeBytes = 432; };

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount ? machine.multiprocessors
           : what == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? machine.shared
           : what == cudaDevAttrMaxSharedMemoryPerBlockOptin ? machine.shared - 1024 : 1024;
  return cudaSuccess;
}
template <class Kernel> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) { return cudaSuccess; }
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
  std::memset(memory, byte, bytes);
  return cudaSuccess;
}
template <class... Parameters, size_t... kIndex>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<kIndex...>) {
  kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[kIndex])...);
}
template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), int blocks, int threads, void** arguments, size_t,
                             cudaStream_t) {
  std::vector<std::thread> running;
  for (int i = 0; i < blocks; ++i)
    running.emplace_back([=] {
      auto block = std::make_unique<Block>();
      block->count = threads;
      block->reverse = machine.reverse;
      block->body = [=] { call(kernel, arguments, std::index_sequence_for<Parameters...>()); };
      block->run();
    });
  for (std::thread& each : running) each.join();
  return cudaSuccess;
}
