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
#include "memory_order.h"

namespace fastbert {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = kCudaChunk / kThreads;
constexpr int kBlocksPerSM = 3;
constexpr int kWarps = kThreads / 32;
constexpr int kSlotBytes = kCudaChunk * 2 * sizeof(float);
static_assert(kPerThread == 8, "a thread has two runs of 4 elements");
static_assert(sizeof(LambBatch) + sizeof(int) <= 32764, "the arguments of a kernel");

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
  return reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + part.start)[threadIdx.x];
}

// Elements of a warp that takes 16 bytes at a time.

__device__ Values load_floats(const float* data, LambPart part) {
  Values values;
  #pragma unroll
  for (int run = 0; run < 2; ++run) {
    const float4 four = *reinterpret_cast<const float4*>(data + part.start + run_of(run));
    values.at[4 * run] = four.x;
    values.at[4 * run + 1] = four.y;
    values.at[4 * run + 2] = four.z;
    values.at[4 * run + 3] = four.w;
  }
  return values;
}

__device__ Values load(const void* data, int type, LambPart part) {
  if (type == kFloat) return load_floats(static_cast<const float*>(data), part);
  return unpack(trade_in(neighbours(data, part)), type == kHalf);
}

__device__ float4 four_of(const Values& values, int run) {
  return make_float4(values.at[4 * run], values.at[4 * run + 1], values.at[4 * run + 2], values.at[4 * run + 3]);
}

__device__ void store_floats(float* data, LambPart part, const Values& values) {
  #pragma unroll
  for (int run = 0; run < 2; ++run)
    *reinterpret_cast<float4*>(data + part.start + run_of(run)) = four_of(values, run);
}

__device__ void store(void* data, int type, LambPart part, const Values& values) {
  if (type == kFloat) return store_floats(static_cast<float*>(data), part, values);
  Words words;
  #pragma unroll
  for (int i = 0; i < 4; ++i) words.at[i] = pack(values.at[2 * i], values.at[2 * i + 1], type == kHalf);
  reinterpret_cast<uint4*>(static_cast<uint16_t*>(data) + part.start)[threadIdx.x] = trade_out(words);
}

// One element, of a warp that cannot.

__device__ float load_one(const void* data, int type, int64_t index) {
  if (type == kFloat) return static_cast<const float*>(data)[index];
  return unpack(static_cast<const uint16_t*>(data)[index], type == kHalf).x;
}

__device__ void store_one(void* data, int type, int64_t index, float value) {
  if (type == kFloat) static_cast<float*>(data)[index] = value;
  else static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(pack(value, 0.0f, type == kHalf));
}

class CudaBlock {
 public:
  static constexpr int kChunk = kCudaChunk;

  __device__ explicit CudaBlock(float4* slots) : slots_(slots) {}

  __device__ bool leader() const { return threadIdx.x == 0; }
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return kThreads; }
  __device__ int claim(int* counter) { return atomicAdd(counter, 1); }
  __device__ int arrive(int* counter) { return add_acq_rel(counter); }
  __device__ int ask(const int* const (&flags)[kSlots + 1]) {  // thread i asks for flag i
    const int* mine = nullptr;
    #pragma unroll
    for (int i = 0; i <= kSlots; ++i)
      if (threadIdx.x == i) mine = flags[i];
    return mine == nullptr ? 0 : load_relaxed(mine);
  }
  __device__ unsigned answer(int asked) {
    if (threadIdx.x >= 32) return 0;
    const unsigned ready = __ballot_sync(~0u, asked);
    if (ready) fence_acq_rel();
    __syncwarp();
    return ready;
  }
  __device__ bool is_set(const int* flag) { return load_acquire(flag); }
  __device__ void set(int* flag) { store_release(flag, 1); }
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
    static __shared__ LambNorms warps[2][kWarps];
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
        if (!is_whole(t, part)) {
          #pragma unroll 1
          for (int k = 0; k < kPerThread && element(k) < part.n; ++k)
            sum += square(load_one(t.grad, t.grad_type, part.start + element(k)));
        } else if (t.grad_type == kFloat) {
          sum += square(load_floats(static_cast<const float*>(t.grad), part));
        } else {
          const uint4 raw = neighbours(t.grad, part);  // the order does not matter here
          words[i] = {{raw.x, raw.y, raw.z, raw.w}};
          types[i] = t.grad_type;
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
    float weight = 0.0f, update = 0.0f;
    if (is_whole(t, part)) {
      Values m = load_floats(t.exp_avg, part);
      Values v = load_floats(t.exp_avg_sq, part);
      const Values w = load(t.weight, t.weight_type, part);
      Values u = load(t.grad, t.grad_type, part);
      #pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        lamb_moments(s, u.at[i], m.at[i], v.at[i]);
        u.at[i] = lamb_update(s, w.at[i], m.at[i], v.at[i]);
        weight += w.at[i] * w.at[i];
        update += u.at[i] * u.at[i];
      }
      store_floats(t.exp_avg, part, m);
      store_floats(t.exp_avg_sq, part, v);
      #pragma unroll
      for (int run = 0; slot >= 0 && run < 2; ++run) {
        kept(slot, run) = four_of(u, run);
        kept(slot, 2 + run) = four_of(w, run);
      }
      if (at_once) write(t, part, w, u, lr);
    } else {
      #pragma unroll 1
      for (int i = 0; i < kPerThread && element(i) < part.n; ++i) {
        const int64_t index = part.start + element(i);
        float m = t.exp_avg[index], v = t.exp_avg_sq[index];
        const float w = load_one(t.weight, t.weight_type, index);
        lamb_moments(s, load_one(t.grad, t.grad_type, index), m, v);
        const float u = lamb_update(s, w, m, v);
        weight += w * w;
        update += u * u;
        t.exp_avg[index] = m;
        t.exp_avg_sq[index] = v;
        if (slot >= 0) {
          kept_one(slot, i) = u;
          kept_one(slot, kPerThread + i) = w;
        }
        if (at_once) write_one(t, index, w - lr * u);
      }
    }
    return {weight, update};
  }

  __device__ void apply_kept(const LambTensor& t, LambPart part, int slot, float scale) {
    if (is_whole(t, part)) {
      Values u, w;
      #pragma unroll
      for (int run = 0; run < 2; ++run) {
        const float4 a = kept(slot, run), b = kept(slot, 2 + run);
        u.at[4 * run] = a.x, u.at[4 * run + 1] = a.y, u.at[4 * run + 2] = a.z, u.at[4 * run + 3] = a.w;
        w.at[4 * run] = b.x, w.at[4 * run + 1] = b.y, w.at[4 * run + 2] = b.z, w.at[4 * run + 3] = b.w;
      }
      write(t, part, w, u, scale);
    } else {
      #pragma unroll 1
      for (int i = 0; i < kPerThread && element(i) < part.n; ++i)
        write_one(t, part.start + element(i), kept_one(slot, kPerThread + i) - scale * kept_one(slot, i));
    }
  }

  __device__ void apply(const LambScalars& s, const LambTensor& t, LambPart part, float scale) {
    if (is_whole(t, part)) {
      const Values m = load_floats(t.exp_avg, part);
      const Values v = load_floats(t.exp_avg_sq, part);
      const Values w = load(t.weight, t.weight_type, part);
      Values u;
      #pragma unroll
      for (int i = 0; i < kPerThread; ++i) u.at[i] = lamb_update(s, w.at[i], m.at[i], v.at[i]);
      write(t, part, w, u, scale);
    } else {
      #pragma unroll 1
      for (int i = 0; i < kPerThread && element(i) < part.n; ++i) {
        const int64_t index = part.start + element(i);
        const float w = load_one(t.weight, t.weight_type, index);
        write_one(t, index, w - scale * lamb_update(s, w, t.exp_avg[index], t.exp_avg_sq[index]));
      }
    }
  }

 private:
  __device__ static LambPlan* plans() {
    static __shared__ LambPlan plans[2];
    return plans;
  }

  __device__ static double square(float value) { return static_cast<double>(value) * value; }
  __device__ static double square(const Values& values) {
    double sum = 0.0;
    #pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum += square(values.at[i]);
    return sum;
  }

  __device__ static void write(const LambTensor& t, LambPart part, Values w, const Values& u, float scale) {
    #pragma unroll
    for (int i = 0; i < kPerThread; ++i) w.at[i] -= scale * u.at[i];
    store(t.weight, t.weight_type, part, w);
    if (t.copy != nullptr) store(t.copy, t.copy_type, part, w);
  }

  __device__ static void write_one(const LambTensor& t, int64_t index, float w) {
    store_one(t.weight, t.weight_type, index, w);
    if (t.copy != nullptr) store_one(t.copy, t.copy_type, index, w);
  }

  // This thread's runs in a slot: two of u, two of w; and one of their numbers.
  __device__ float4& kept(int slot, int run) { return slots_[(slot * 4 + run) * kThreads + threadIdx.x]; }
  __device__ float& kept_one(int slot, int i) { return reinterpret_cast<float*>(&kept(slot, i / 4))[i % 4]; }

  float4* slots_;  // [slots][4 runs][threads]
  int turn_ = 0, sum_turn_ = 0;
};

__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
lamb_kernel(const __grid_constant__ LambBatch batch, int phases) {
  extern __shared__ float4 slots[];
  CudaBlock block(slots);
  lamb_run(block, batch, phases);
}

const char* message(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next launch of anybody would report it again
  return cudaGetErrorString(status);
}

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
  batch.slots = std::max(0, std::min(kSlots, room / kSlotBytes));
  const int bytes = batch.slots * kSlotBytes;
  status = cudaFuncSetAttribute(lamb_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return message(status);
  const int blocks = std::min(batch.chunks, multiprocessors * kBlocksPerSM);
  void* arguments[] = {&batch, &phases};
  status = cudaLaunchKernel(lamb_kernel, blocks, kThreads, arguments, bytes, static_cast<cudaStream_t>(stream));
  return message(status);
}

const char* clear_cuda(void* memory, size_t bytes, void* stream) {
  return message(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace fastbert
