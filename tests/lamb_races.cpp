// The course of csrc/lamb.h with a thread for each block, for the thread sanitizer: what a block reads must have been
// written before, by what the course itself waits for. Prints the sum of the weights, which must not depend on threads.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "lamb_launch.h"

using namespace fastbert;

namespace {

const std::vector<int> kSizes = {40, 9 * kCpuChunk + 5, 7, 0, 3 * kCpuChunk, 2 * kCpuChunk + 1, 100};

struct Run {
  std::vector<std::vector<float>> weights, grads, m, v;
  std::vector<float> steps = std::vector<float>(kSizes.size(), 0.0f);
  LambBatch batch = {};
  std::vector<int> zeroed, next;
  std::vector<float> bias;
  std::vector<LambNorms> sums, totals = std::vector<LambNorms>(kSizes.size());
  std::vector<double> norm_sums;
  double total = 0.0;

  Run() {
    for (size_t i = 0; i < kSizes.size(); ++i) {
      const auto fill = [&](float scale) {
        std::vector<float> values(kSizes[i] + 1);
        for (float& value : values) value = scale * (std::rand() % 2001 - 1000) / 1000;
        return values;
      };
      weights.push_back(fill(0.1f));
      grads.push_back(fill(1.0f));
      m.push_back(fill(0.0f));
      v.push_back(fill(0.0f));
    }
    for (size_t i = 0; i < kSizes.size(); ++i) {
      batch.tensors[i] = {weights[i].data(), nullptr,    grads[i].data(), m[i].data(),  v[i].data(), &steps[i],
                          kSizes[i],         batch.chunks, static_cast<uint8_t>(i % 2), kFloat, kFloat, kFloat, 0};
      batch.chunks += lamb_chunks(kSizes[i], kCpuChunk);
    }
    batch.groups[0] = {0.9, 0.999, nullptr, 0.01f, 1e-6f, 0.01f, true, true, true};
    batch.groups[1] = {0.9, 0.999, nullptr, 0.01f, 1e-6f, 0.0f, true, true, false};
    batch.count = static_cast<int>(kSizes.size());
    batch.items = lamb_items(batch.chunks);
    batch.max_grad_norm = 1.0;
    next.resize(batch.chunks);
    sums.resize(batch.chunks);
    norm_sums.resize(batch.items);
    bias.resize(2 * batch.count);
  }

  void step(int threads) {
    zeroed.assign(6 + 2 * batch.count, 0);
    int* begin = zeroed.data();
    batch.work = {begin + 2,   begin,       begin + 6,        begin + 6 + batch.count, bias.data(),
                  next.data(), sums.data(), norm_sums.data(), &total,                  totals.data()};
    lamb_cpu(batch, kNorm | kMoments | kApply, threads, [](int64_t count, const Range& body) {
      std::vector<std::thread> running;
      for (int64_t i = 0; i < count; ++i) running.emplace_back([&body, i] { body(i, i + 1); });
      for (std::thread& thread : running) thread.join();
    });
  }
};

}  // namespace

int main(int, char** arguments) {
  std::srand(0);
  Run run;
  for (int i = 0; i < 20; ++i) run.step(std::atoi(arguments[1]));
  double sum = 0.0;
  for (size_t i = 0; i < kSizes.size(); ++i)
    for (int k = 0; k < kSizes[i]; ++k) sum += run.weights[i][k] * (k % 7 + 1);
  std::printf("%.17g %g\n", sum, run.steps[1]);
}
