// LAMB on CUDA: two launches for up to 256 tensors, with the body of lamb.h run by one block per chunk.
//
// The norms are reduced in two stages in a fixed order: a block sums its chunk, and every block of the second pass sums
// the chunks of its tensor. No atomics, no host synchronisation, no memory but the scratch buffer.
#include <cuda_runtime.h>

#include <algorithm>

#include "lamb.h"

namespace fastbert {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 4;  // independent loads in flight per thread and array
constexpr int kBlocksPerSM = 8;
constexpr int kBatch = 256;  // tensors per launch: 11 KB of kernel arguments, of the 32 KB that CUDA 12.1 allows

// The tensors of one launch. Their chunks are numbered through: tensor i owns first_chunk[i] .. first_chunk[i + 1] - 1.
struct Batch {
  LambTensor tensors[kBatch];
  int first_chunk[kBatch + 1];
  int count;
};

struct Chunk {
  int tensor;
  int64_t start, n;
};

__device__ Chunk locate(const Batch& batch, int chunk) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.first_chunk[middle] <= chunk) low = middle;
    else high = middle;
  }
  const int64_t start = (chunk - batch.first_chunk[low]) * kLambChunk;
  const int64_t left = batch.tensors[low].numel - start;
  return {low, start, left < kLambChunk ? left : kLambChunk};
}

// The sum over the block, the same bits in every thread and on every run.
__device__ LambNorms block_sum(LambNorms value) {
  __shared__ double param[kThreads / 32], update[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value.param += __shfl_xor_sync(0xffffffffu, value.param, offset);
    value.update += __shfl_xor_sync(0xffffffffu, value.update, offset);
  }
  __syncthreads();  // everyone has read what the previous call left
  if (threadIdx.x % 32 == 0) {
    param[threadIdx.x / 32] = value.param;
    update[threadIdx.x / 32] = value.update;
  }
  __syncthreads();
  LambNorms total = {0.0, 0.0};
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    total.param += param[warp];
    total.update += update[warp];
  }
  return total;
}

// Five blocks an SM are what fits anyway; said aloud, ptxas (13.0) needs no stack for sm_100.
__global__ void __launch_bounds__(kThreads, 5)
moments_kernel(const __grid_constant__ Batch batch, const LambStep step, LambNorms* sums) {
  const int chunks = batch.first_chunk[batch.count];
  for (int c = blockIdx.x; c < chunks; c += gridDim.x) {
    const Chunk chunk = locate(batch, c);
    const LambNorms total =
        block_sum(lamb_moments<kLanes>(step, batch.tensors[chunk.tensor], chunk.start, chunk.n, threadIdx.x, kThreads));
    if (threadIdx.x == 0) sums[c] = total;
  }
}

__global__ void __launch_bounds__(kThreads)
apply_kernel(const __grid_constant__ Batch batch, const LambStep step, const LambNorms* sums) {
  // Backwards: what the first pass touched last is still in L2.
  for (int c = batch.first_chunk[batch.count] - 1 - blockIdx.x; c >= 0; c -= gridDim.x) {
    const Chunk chunk = locate(batch, c);
    float ratio = 1.0f;
    if (step.adapt) {
      LambNorms total = {0.0, 0.0};
      const int end = batch.first_chunk[chunk.tensor + 1];
      for (int i = batch.first_chunk[chunk.tensor] + threadIdx.x; i < end; i += kThreads) {
        total.param += sums[i].param;
        total.update += sums[i].update;
      }
      ratio = static_cast<float>(lamb_ratio(block_sum(total)));
    }
    lamb_apply<kLanes>(step, batch.tensors[chunk.tensor], ratio, chunk.start, chunk.n, threadIdx.x, kThreads);
  }
}

}  // namespace

const char* lamb_cuda(const LambStep& step, const std::vector<LambTensor>& group, LambNorms* sums, int device,
                      void* stream) {
  int multiprocessors = 0;
  cudaError_t status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  for (size_t first = 0; status == cudaSuccess && first < group.size(); first += kBatch) {
    Batch batch;
    batch.count = static_cast<int>(std::min<size_t>(kBatch, group.size() - first));
    batch.first_chunk[0] = 0;
    for (int i = 0; i < batch.count; ++i) {
      batch.tensors[i] = group[first + i];
      batch.first_chunk[i + 1] = batch.first_chunk[i] + static_cast<int>(lamb_chunks(batch.tensors[i].numel));
    }
    const int chunks = batch.first_chunk[batch.count];
    const int blocks = std::min(chunks, multiprocessors * kBlocksPerSM);
    moments_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch, step, sums);
    apply_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch, step, sums);
    status = cudaGetLastError();
    sums += chunks;
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace fastbert
