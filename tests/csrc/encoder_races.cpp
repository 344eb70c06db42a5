// csrc/encoder_layers.cu on the CPU for the thread sanitizer: what a block reads from global memory must have been
// written before, by what the counters wait for. Prints a sum of the result, which must not depend on the blocks.
#include "cuda_on_cpu.h"

#include "encoder_layers.cu"
#include "encoder_run.h"

namespace fastbert {
namespace {
__thread uint4 encoder_memory[232448 / 16];  // the shared memory of a block
}
}  // namespace fastbert

int main(int, char** arguments) {
  machine = {std::atoi(arguments[1]), 233472, false, false};
  EncoderRun run({1, 66, 64, 64, 1, 2, fastbert::kRelu, false, 1});  // two tiles of a sequence
  EncoderRun::Bits output;
  const char* const message = run.run(output);
  if (message != nullptr) return std::puts(message), 1;
  uint64_t sum = 0;
  for (size_t i = 0; i < output.size(); ++i) sum += output[i] * (i % 7 + 1);
  std::printf("%llu\n", static_cast<unsigned long long>(sum));
}
