// LAMB on CUDA: one launch, in which blocks of 256 threads follow the course of lamb.h, a chunk at a time.
//
// A thread has 8 elements of a chunk: two runs of 4, so that a warp's accesses of 16 bytes to float32 arrays are
// contiguous. Of a 16-bit array it reads 8 neighbours, 16 bytes again, and the warp trades them. Elements stay with
// their thread in all phases, so what a thread keeps in shared memory is its own and needs no barrier. Per parameter:
// 2 bytes of gradient for the norm (in part from L2), 28 where u and w are kept, 40 where they are not.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "lamb_launch.h"

namespace fastbert {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = kCudaChunk / kThreads;
constexpr int kBlocksPerSM = 3;
constexpr int kWarps = kThreads / 32;
constexpr int kSlotBytes = kCudaChunk * 2 * sizeof(float);
static_assert(kPerThread == 8, "a thread has two runs of 4 elements");
static_assert(sizeof(LambBatch) <= 32764, "the arguments of a kernel");

struct Values {
  float at[kPerThread];
};

// The four 32-bit words of 8 neighbouring 16-bit numbers in this lane, as the warp's runs: 2 words of each.
struct Words {
  uint32_t at[4];
};

__device__ Words trade_in(uint4 raw) {  // from neighbours to runs
  const int lane = threadIdx.x % 32;
  Words words;
  #pragma unroll
  for (int run = 0; run < 2; ++run) {
    const int from = 16 * run + lane / 2;
    const uint32_t x = __shfl_sync(~0u, raw.x, from), y = __shfl_sync(~0u, raw.y, from);
    const uint32_t z = __shfl_sync(~0u, raw.z, from), w = __shfl_sync(~0u, raw.w, from);
    words.at[2 * run] = lane % 2 ? z : x;
    words.at[2 * run + 1] = lane % 2 ? w : y;
  }
  return words;
}

__device__ uint4 trade_out(Words words) {  // and back
  const int lane = threadIdx.x % 32, from = 2 * lane % 32;
  uint32_t got[2][4];  // of each run, if this lane's neighbours were in it
  #pragma unroll
  for (int run = 0; run < 2; ++run)
    #pragma unroll
    for (int i = 0; i < 4; ++i) got[run][i] = __shfl_sync(~0u, words.at[2 * run + i % 2], from + i / 2);
  return lane < 16 ? make_uint4(got[0][0], got[0][1], got[0][2], got[0][3])
                   : make_uint4(got[1][0], got[1][1], got[1][2], got[1][3]);
}

__device__ float2 unpack(uint32_t word, bool half) {
  if (half) return __half22float2(reinterpret_cast<const __half2&>(word));
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
}

__device__ uint32_t pack(float low, float high, bool half) {
  if (half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ Values unpack(Words words, bool half) {
  Values values;
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words.at[i], half);
    values.at[2 * i] = pair.x;
    values.at[2 * i + 1] = pair.y;
  }
  return values;
}

// Where this thread's elements are: element i is the first of its run + i % 4.
__device__ int run_of(int run) { return threadIdx.x / 32 * 256 + 128 * run + 4 * (threadIdx.x % 32); }
__device__ int element(int i) { return run_of(i / 4) + i % 4; }

// Whether this thread's warp can take 16 bytes at a time.
__device__ bool is_whole(const LambTensor& t, LambPart part) {
  return t.aligned && threadIdx.x / 32 * 256 + 256 <= part.n;
}

__device__ uint4 neighbours(const void* data, LambPart part) {
  return __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + part.start) + threadIdx.x);
}

__device__ Values load_floats(const float* data, LambPart part, bool whole) {
  Values values;
  if (whole) {
    #pragma unroll
    for (int run = 0; run < 2; ++run) {
      const float4 four = *reinterpret_cast<const float4*>(data + part.start + run_of(run));
      values.at[4 * run] = four.x;
      values.at[4 * run + 1] = four.y;
      values.at[4 * run + 2] = four.z;
      values.at[4 * run + 3] = four.w;
    }
  } else {
    #pragma unroll
    for (int i = 0; i < kPerThread; ++i) values.at[i] = element(i) < part.n ? data[part.start + element(i)] : 0.0f;
  }
  return values;
}

__device__ Values load(const void* data, int type, LambPart part, bool whole) {
  if (type == kFloat) return load_floats(static_cast<const float*>(data), part, whole);
  if (whole) return unpack(trade_in(neighbours(data, part)), type == kHalf);
  Values values;
  #pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool inside = element(i) < part.n;
    const uint32_t bits = inside ? static_cast<const uint16_t*>(data)[part.start + element(i)] : 0;
    values.at[i] = unpack(bits, type == kHalf).x;
  }
  return values;
}

__device__ void store_floats(float* data, LambPart part, bool whole, const Values& values) {
  if (whole) {
    #pragma unroll
    for (int run = 0; run < 2; ++run)
      *reinterpret_cast<float4*>(data + part.start + run_of(run)) = make_float4(
          values.at[4 * run], values.at[4 * run + 1], values.at[4 * run + 2], values.at[4 * run + 3]);
  } else {
    #pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (element(i) < part.n) data[part.start + element(i)] = values.at[i];
  }
}

__device__ void store(void* data, int type, LambPart part, bool whole, const Values& values) {
  if (type == kFloat) return store_floats(static_cast<float*>(data), part, whole, values);
  uint16_t* begin = static_cast<uint16_t*>(data) + part.start;
  if (whole) {
    Words words;
    #pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = pack(values.at[2 * i], values.at[2 * i + 1], type == kHalf);
    reinterpret_cast<uint4*>(begin)[threadIdx.x] = trade_out(words);
  } else {
    #pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (element(i) < part.n) begin[element(i)] = static_cast<uint16_t>(pack(values.at[i], 0.0f, type == kHalf));
  }
}

class CudaBlock {
 public:
  static constexpr int kChunk = kCudaChunk;

  __device__ explicit CudaBlock(float4* slots) : slots_(slots) {}

  __device__ bool leader() const { return threadIdx.x == 0; }
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return kThreads; }
  __device__ int claim(int* counter) { return atomicAdd(counter, 1); }
  __device__ int arrive(int* counter) {
    __threadfence();
    const int before = atomicAdd(counter, 1);
    __threadfence();
    return before;
  }
  __device__ unsigned ask(const int* const (&flags)[kSlots + 1]) {  // thread i asks for flag i
    const int* mine = nullptr;
    #pragma unroll
    for (int i = 0; i <= kSlots; ++i)
      if (threadIdx.x == i) mine = flags[i];
    return mine == nullptr ? 0 : *static_cast<const volatile int*>(mine);
  }
  __device__ unsigned answer(unsigned asked) {
    if (threadIdx.x >= 32) return 0;
    const unsigned ready = __ballot_sync(~0u, asked);
    if (ready) __threadfence();
    return ready;
  }
  __device__ bool is_set(const int* flag) {
    const bool yes = *static_cast<const volatile int*>(flag);
    if (yes) __threadfence();
    return yes;
  }
  __device__ void set(int* flag) {
    __threadfence();
    *static_cast<volatile int*>(flag) = 1;
  }
  __device__ void relax() { __nanosleep(100); }
  __device__ double fresh(const double* address) { return __ldcg(address); }

  __device__ LambPlan& next() { return plans()[turn_ ^ 1]; }
  __device__ const LambPlan& flip() {
    __syncthreads();
    turn_ ^= 1;
    return plans()[turn_];
  }

  __device__ double sum(double value) { return sum(LambNorms{value, 0.0}).weight; }
  __device__ LambNorms sum(LambNorms value) {
    __shared__ LambNorms warps[2][kWarps];
    for (int offset = 16; offset > 0; offset /= 2) {
      value.weight += __shfl_xor_sync(~0u, value.weight, offset);
      value.update += __shfl_xor_sync(~0u, value.update, offset);
    }
    sum_turn_ ^= 1;
    if (threadIdx.x % 32 == 0) warps[sum_turn_][threadIdx.x / 32] = value;
    __syncthreads();
    LambNorms total = {0.0, 0.0};
    if (leader()) {
      for (int warp = 0; warp < kWarps; ++warp) {
        total.weight += warps[sum_turn_][warp].weight;
        total.update += warps[sum_turn_][warp].update;
      }
    }
    return total;
  }

  __device__ double squares(const LambBatch& batch, int first, int last) {
    constexpr int kInFlight = 4;
    double sum = 0.0;
    int tensor = lamb_tensor_of(batch, first);
    for (int chunk = first; chunk < last; chunk += kInFlight) {
      Words words[kInFlight];  // of 16-bit gradients, asked for together
      int types[kInFlight];
      #pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        types[i] = -1;
        if (chunk + i >= last) continue;
        if (chunk + i == lamb_end(batch, tensor)) ++tensor;
        const LambTensor& t = batch.tensors[tensor];
        const LambPart part = lamb_part<kChunk>(batch, chunk + i, tensor);
        if (t.grad_type != kFloat && is_whole(t, part)) {
          const uint4 raw = neighbours(t.grad, part);  // the order does not matter here
          words[i] = {{raw.x, raw.y, raw.z, raw.w}};
          types[i] = t.grad_type;
        } else {
          sum += square(load(t.grad, t.grad_type, part, is_whole(t, part)));
        }
      }
      #pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (types[i] == kHalf) {  // 8 squares of at most 65504 each are far from the end of float
          const Values values = unpack(words[i], true);
          float some = 0.0f;
          #pragma unroll
          for (int k = 0; k < kPerThread; ++k) some += values.at[k] * values.at[k];
          sum += some;
        } else if (types[i] == kBFloat16) {
          sum += square(unpack(words[i], false));
        }
      }
    }
    return sum;
  }

  __device__ LambNorms moments(const LambScalars& s, const LambTensor& t, LambPart part, int slot, bool at_once,
                               float lr) {
    const bool whole = is_whole(t, part);
    Values m = load_floats(t.exp_avg, part, whole);
    Values v = load_floats(t.exp_avg_sq, part, whole);
    Values w = load(t.weight, t.weight_type, part, whole);
    const Values g = load(t.grad, t.grad_type, part, whole);
    Values u;
    float weight = 0.0f, update = 0.0f;
    #pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      lamb_moments(s, g.at[i], m.at[i], v.at[i]);
      u.at[i] = whole || element(i) < part.n ? lamb_update(s, w.at[i], m.at[i], v.at[i]) : 0.0f;
      weight += w.at[i] * w.at[i];
      update += u.at[i] * u.at[i];
    }
    store_floats(t.exp_avg, part, whole, m);
    store_floats(t.exp_avg_sq, part, whole, v);
    if (slot >= 0) {
      float4* mine = slots_ + slot * 4 * kThreads + threadIdx.x;
      #pragma unroll
      for (int run = 0; run < 2; ++run) {
        mine[run * kThreads] = make_float4(u.at[4 * run], u.at[4 * run + 1], u.at[4 * run + 2], u.at[4 * run + 3]);
        mine[(2 + run) * kThreads] =
            make_float4(w.at[4 * run], w.at[4 * run + 1], w.at[4 * run + 2], w.at[4 * run + 3]);
      }
    }
    if (at_once) write(t, part, whole, w, u, lr);
    return {weight, update};
  }

  __device__ void apply_kept(const LambTensor& t, LambPart part, int slot, float scale) {
    const float4* mine = slots_ + slot * 4 * kThreads + threadIdx.x;
    Values u, w;
    #pragma unroll
    for (int run = 0; run < 2; ++run) {
      const float4 a = mine[run * kThreads], b = mine[(2 + run) * kThreads];
      u.at[4 * run] = a.x, u.at[4 * run + 1] = a.y, u.at[4 * run + 2] = a.z, u.at[4 * run + 3] = a.w;
      w.at[4 * run] = b.x, w.at[4 * run + 1] = b.y, w.at[4 * run + 2] = b.z, w.at[4 * run + 3] = b.w;
    }
    write(t, part, is_whole(t, part), w, u, scale);
  }

  __device__ void apply(const LambScalars& s, const LambTensor& t, LambPart part, float scale) {
    const bool whole = is_whole(t, part);
    const Values m = load_floats(t.exp_avg, part, whole);
    const Values v = load_floats(t.exp_avg_sq, part, whole);
    const Values w = load(t.weight, t.weight_type, part, whole);
    Values u;
    #pragma unroll
    for (int i = 0; i < kPerThread; ++i) u.at[i] = lamb_update(s, w.at[i], m.at[i], v.at[i]);
    write(t, part, whole, w, u, scale);
  }

 private:
  __device__ static LambPlan* plans() {
    __shared__ LambPlan plans[2];
    return plans;
  }

  __device__ static double square(const Values& values) {
    double sum = 0.0;
    #pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum += static_cast<double>(values.at[i]) * values.at[i];
    return sum;
  }

  __device__ static void write(const LambTensor& t, LambPart part, bool whole, Values w, const Values& u, float scale) {
    #pragma unroll
    for (int i = 0; i < kPerThread; ++i) w.at[i] -= scale * u.at[i];
    store(t.weight, t.weight_type, part, whole, w);
    if (t.copy != nullptr) store(t.copy, t.copy_type, part, whole, w);
  }

  float4* slots_;  // [slots][2 runs of u, 2 of w][threads]
  int turn_ = 0, sum_turn_ = 0;
};

__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
lamb_kernel(const __grid_constant__ LambBatch batch, int phases) {
  extern __shared__ float4 slots[];
  CudaBlock block(slots);
  lamb_run(block, batch, phases);
}

const char* message(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

}  // namespace

const char* lamb_cuda(LambBatch& batch, int phases, void* stream) {
  int device = 0, multiprocessors = 0, shared = 0, reserved = 0;
  cudaFuncAttributes kernel;
  cudaError_t status = cudaGetDevice(&device);
  const auto ask = [&](int& value, cudaDeviceAttr what) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, what, device);
  };
  ask(multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&kernel, lamb_kernel);
  if (status != cudaSuccess) return message(status);
  const int room = shared / kBlocksPerSM - reserved - static_cast<int>(kernel.sharedSizeBytes);
  batch.slots = std::min(kSlots, room / kSlotBytes);
  const int bytes = batch.slots * kSlotBytes;
  status = cudaFuncSetAttribute(lamb_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return message(status);
  const int blocks = std::min(batch.chunks, multiprocessors * kBlocksPerSM);
  lamb_kernel<<<blocks, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(batch, phases);
  return message(cudaGetLastError());
}

const char* clear_cuda(void* memory, size_t bytes, void* stream) {
  return message(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace fastbert
