// Runs csrc/lamb.cu itself, thread by thread, and compares with csrc/lamb_cpu.cpp: moments to the bit, weights and the
// 16-bit copies to the rounding of the norms, which are added in another order. Prints each case, and how many failed.
#include "cuda_on_cpu.h"

#include "lamb.cu"
#include "lamb_run.h"

namespace fastbert {
namespace {
__thread float4 slots[kSlots * 4 * kThreads];  // the shared memory of a block
}
}  // namespace fastbert

using namespace fastbert;

namespace {

double value_at(const void* data, LambType type, int i) {
  if (type == kFloat) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (type == kBFloat16) return wide(bits);
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return half;
}

// Largest difference, relative to the largest value.
double difference(const void* a, const void* b, LambType type, int n) {
  double worst = 0.0, largest = 1e-30;
  for (int i = 0; i < n; ++i) {
    const double x = value_at(a, type, i), y = value_at(b, type, i);
    if (!(std::abs(x - y) <= worst)) worst = std::abs(x - y);
    if (std::abs(y) > largest) largest = std::abs(y);
  }
  return worst / largest;
}

int check(const char* name, std::vector<int> sizes, int offset, std::vector<int> phases, bool bad) {
  Run cuda(sizes, kCudaChunk, offset), cpu(sizes, kCpuChunk, offset);
  const float found = bad;
  for (Run* run : {&cuda, &cpu}) {
    run->begin();
    run->batch->found_inf = &found;
  }
  const Run before(sizes, kCpuChunk, offset);
  for (const int part : phases) lamb_cuda(*cuda.batch, part, nullptr);
  lamb_cpu(*cpu.batch, 7, 1, [](int64_t count, const Range& body) { body(0, count); });
  int wrong = std::abs(cuda.total - cpu.total) > 1e-7 * cpu.total;
  for (int i = 0; i < cpu.batch->count; ++i) {
    const LambTensor &a = cuda.batch->tensors[i], &b = cpu.batch->tensors[i], &old = before.batch->tensors[i];
    const int n = sizes[i];
    const auto type = static_cast<LambType>(b.weight_type), narrow = static_cast<LambType>(b.copy_type);
    const double spacing = type == kFloat ? 1e-6 : type == kHalf ? 1e-3 : 8e-3;
    wrong += n > 0 && std::memcmp(a.exp_avg, b.exp_avg, 4 * n) != 0;
    wrong += n > 0 && std::memcmp(a.exp_avg_sq, b.exp_avg_sq, 4 * n) != 0;
    wrong += difference(a.weight, b.weight, type, n) > spacing;
    if (b.copy != nullptr) wrong += difference(a.copy, b.copy, narrow, n) > 8e-3;
    wrong += *a.step != (bad ? 2.0f : 3.0f);
    // And it did something, or nothing.
    if (n > 0) wrong += (difference(a.weight, old.weight, type, n) > 0.0) == bad;
  }
  std::printf("%-28s %s\n", name, wrong ? "WRONG" : "right");
  std::fflush(stdout);
  return wrong != 0;
}

}  // namespace

int main() {
  const std::vector<int> small = {1, 7, 0, 255, 256, 257, 2047, 2048, 2049, 5};
  const std::vector<int> large = {40,  11 * kCudaChunk + 300, 7, 4 * kCudaChunk, 3 * kCudaChunk + 256,
                                  900, 9 * kCudaChunk};
  int failed = 0;
  for (const bool reverse : {false, true})
    for (const int multiprocessors : {1, 2}) {
      machine = {multiprocessors, multiprocessors == 1 ? 233472 : reverse ? 102400 : 40000, reverse};
      failed += check("small", small, 0, {7}, false);
      failed += check("large", large, 0, {7}, false);
      failed += check("large, not aligned", large, 1, {7}, false);
      failed += check("large, phases apart", large, 0, {1, 2, 4}, false);
      failed += check("large, norm apart", large, 0, {1, 6}, false);
      failed += check("large, overflow", large, 0, {7}, true);
    }
  std::printf("%d failed\n", failed);
  return failed != 0;
}
