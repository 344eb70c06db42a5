// As much of CUDA as csrc/lamb.cu uses, on a CPU: what a GPU would run can be run, and stepped through, without one.
//
// A block is a thread of the operating system; its 256 threads are contexts that take turns and change at barriers,
// shuffles and votes. `reverse` changes the order of the turns. Shared memory belongs to the block: it is __thread.
#pragma once
#define FASTBERT_MEMORY_ORDER_H  // in place of csrc/memory_order.h

#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __shared__ __thread
#define __launch_bounds__(threads, blocks)

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// ---------------------------------------------------------------- threads

struct Index { unsigned x; };
inline thread_local Index threadIdx;

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
  uint32_t traded[64][32];

  void yield() {
    swapcontext(&contexts[current], &main);
    threadIdx.x = current;
  }

  void barrier(int index, int members) {
    const int round = rounds[index];
    if (++come[index] == members) {
      come[index] = 0;
      ++rounds[index];
    }
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
  swapcontext(&block.contexts[block.current], &block.main);
}

inline void Block::run() {
  block_of_thread = this;
  contexts.resize(count);
  stacks.resize(static_cast<size_t>(count) * kStack);
  done.assign(count, false);
  left = count;
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
      if (!done[current]) swapcontext(&main, &contexts[current]);
    }
    std::this_thread::yield();
  }
  for (const int waiting : come)
    if (waiting) std::puts("a thread waits at a barrier that the others have left"), std::abort();
}

inline void __syncthreads() { block_of_thread->barrier(0, block_of_thread->count); }
inline void __syncwarp() { block_of_thread->barrier(threadIdx.x / 32 + 1, 32); }
inline void __nanosleep(unsigned) { block_of_thread->yield(); }

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
inline double __ldcg(const double* address) { return *address; }

namespace fastbert {
inline int add_acq_rel(int* counter) { return as_atomic(counter).fetch_add(1, std::memory_order_acq_rel); }
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

// ---------------------------------------------------------------- the runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes { size_t sharedSizeBytes = 432; };
struct Machine { int multiprocessors = 1, shared = 233472; bool reverse = false; };
inline Machine machine;

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount ? machine.multiprocessors
           : what == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? machine.shared : 1024;
  return cudaSuccess;
}
template <class Kernel> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) { return cudaSuccess; }
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
  std::memset(memory, byte, bytes);
  return cudaSuccess;
}
template <class A, class B>
cudaError_t cudaLaunchKernel(void (*kernel)(A, B), int blocks, int threads, void** arguments, size_t, cudaStream_t) {
  std::vector<std::thread> running;
  for (int i = 0; i < blocks; ++i)
    running.emplace_back([=] {
      Block block;
      block.count = threads;
      block.reverse = machine.reverse;
      block.body = [=] {
        kernel(*static_cast<std::remove_reference_t<A>*>(arguments[0]), *static_cast<B*>(arguments[1]));
      };
      block.run();
    });
  for (std::thread& each : running) each.join();
  return cudaSuccess;
}
