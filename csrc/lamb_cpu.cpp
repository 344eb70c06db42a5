// LAMB on the CPU: the chunks of all tensors over the threads, the body of lamb.h as vector code.
#include <algorithm>

#include "lamb.h"

// Compiled once per vector width, and the loader picks: a build made on one machine runs on another, as wide as it can.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__)
#define FASTBERT_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTBERT_VECTOR_CLONES
#endif

namespace fastbert {

constexpr int kLanes = 16;

FASTBERT_VECTOR_CLONES LambNorms lamb_moments_cpu(const LambStep& step, const LambTensor& tensor, int64_t start,
                                                  int64_t n) {
  return lamb_moments<kLanes>(step, tensor, start, n, 0, 1);
}

FASTBERT_VECTOR_CLONES void lamb_apply_cpu(const LambStep& step, const LambTensor& tensor, float ratio, int64_t start,
                                           int64_t n) {
  lamb_apply<kLanes>(step, tensor, ratio, start, n, 0, 1);
}

void lamb_cpu(const LambStep& step, const std::vector<LambTensor>& group, const ParallelFor& parallel_for) {
  struct Chunk {
    size_t tensor;
    int64_t start, n;
  };
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < group.size(); ++i)
    for (int64_t start = 0; start < group[i].numel; start += kLambChunk)
      chunks.push_back({i, start, std::min(kLambChunk, group[i].numel - start)});

  const auto count = static_cast<int64_t>(chunks.size());
  std::vector<LambNorms> sums(chunks.size());
  parallel_for(count, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      sums[c] = lamb_moments_cpu(step, group[chunks[c].tensor], chunks[c].start, chunks[c].n);
  });

  // Summed in the order of the chunks, so the result does not depend on the number of threads.
  std::vector<LambNorms> norms(group.size());
  for (int64_t c = 0; c < count; ++c) {
    norms[chunks[c].tensor].param += sums[c].param;
    norms[chunks[c].tensor].update += sums[c].update;
  }

  parallel_for(count, [&](int64_t begin, int64_t end) {
    for (int64_t c = end - 1; c >= begin; --c) {  // backwards: what the first pass touched last is still in cache
      const Chunk& chunk = chunks[c];
      const float ratio = step.adapt ? static_cast<float>(lamb_ratio(norms[chunk.tensor])) : 1.0f;
      lamb_apply_cpu(step, group[chunk.tensor], ratio, chunk.start, chunk.n);
    }
  });
}

}  // namespace fastbert
