// The course of csrc/lamb.h with a thread for each block, for the thread sanitizer: what a block reads must have been
// written before, by what the course itself waits for. Prints the sum of the weights, which must not depend on threads.
#include <cstdio>
#include <thread>

#include "lamb_run.h"

using namespace fastbert;

int main(int, char** arguments) {
  Run run({40, 9 * kCpuChunk + 5, 7, 0, 3 * kCpuChunk, 2 * kCpuChunk + 1, 5 * kCpuChunk}, kCpuChunk, 0);
  for (int i = 0; i < 20; ++i) {
    run.begin();
    lamb_cpu(*run.batch, kNorm | kMoments | kApply, std::atoi(arguments[1]), [](int64_t count, const Range& body) {
      std::vector<std::thread> running;
      for (int64_t i = 0; i < count; ++i) running.emplace_back([&body, i] { body(i, i + 1); });
      for (std::thread& thread : running) thread.join();
    });
  }
  double sum = 0.0;
  for (const auto& tensor : run.m)
    for (size_t k = 0; k < tensor.size(); ++k) sum += tensor[k] * (k % 7 + 1);
  for (const int i : {0, 2, 6})
    for (size_t k = 0; k < run.weights[i].size(); ++k) sum += run.weights[i][k] * (k % 7 + 1);
  std::printf("%.17g after step %g\n", sum, run.steps[1]);
}
