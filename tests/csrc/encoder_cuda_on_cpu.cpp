// Runs csrc/encoder_layers.cu itself, thread by thread, and compares with plain implementations. Against one in double
// without any rounding it may be off by twice what an implementation in float is that rounds in the same places. The
// result must be the same bits on any number of multiprocessors, however the threads take turns and whenever copies
// are made. Prints each case, and how many failed.
#include "cuda_on_cpu.h"

#include <string>

#include "encoder_layers.cu"
#include "encoder_run.h"

namespace fastbert {
namespace {
__thread uint4 encoder_memory[232448 / 16];  // the shared memory of a block
}
}  // namespace fastbert

using namespace fastbert;

namespace {

struct Error {
  double most = 0.0, mean = 0.0;  // the mean of squares, under its root
};

template <class Value>
Error error_of(const std::vector<double>& exact, const Value& value) {
  Error error;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double far = std::abs(value(i) - exact[i]);
    if (!(far <= error.most)) error.most = far;  // NaN stays
    error.mean += far * far / exact.size();
  }
  error.mean = std::sqrt(error.mean);
  return error;
}

int check(const char* name, const EncoderCase& c, const std::vector<Machine>& machines) {
  EncoderRun run(c);
  const std::vector<double> exact = run.plain<double>(), plain = run.plain<float>();
  const Error allowed = error_of(exact, [&](size_t i) { return plain[i]; });
  EncoderRun::Bits first, output;
  const Shape shape = shape_of(c.batch, c.length, c.hidden, c.intermediate);
  const std::string tile = std::to_string(shape.tile_rows) + " by " + std::to_string(shape.tile_columns) + ",";
  int wrong = (name + std::string(",")).compare(0, tile.size(), tile) != 0;
  Error error;
  for (const Machine& each : machines) {
    machine = each;
    const char* const message = run.run(output, !first.empty());
    if (message != nullptr) std::puts(message), ++wrong;
    for (size_t i = exact.size(); i < output.size(); ++i) wrong += output[i] != EncoderRun::kUntouched;
    if (first.empty()) {
      first = output;
      error = error_of(exact, [&](size_t i) { return value_of(output[i], c.half); });
      wrong += !(error.most <= 2 * allowed.most) || !(error.mean <= 2 * allowed.mean);
    }
    wrong += output != first;
  }
  if (c.masked) {  // NaN where there is no key does not get anywhere
    for (size_t i = 0; i < run.input.size(); ++i)
      if (!run.mask[i / c.hidden]) run.input[i] = 0x7fff;
    run.run(output);
    for (size_t i = 0; i < run.input.size(); ++i) wrong += run.mask[i / c.hidden] && output[i] != first[i];
  }
  std::printf("%-26s largest error %.2e of %.2e, mean %.2e of %.2e  %s\n", name, error.most, allowed.most, error.mean,
              allowed.mean, wrong ? "WRONG" : "right");
  std::fflush(stdout);
  return wrong != 0;
}

int check_refusals() {
  int wrong = encoder_workspace(1, 1, 64, 64) == 0;
  const int shapes[][4] = {{0, 1, 64, 64}, {9, 1, 64, 64}, {1, 0, 64, 64}, {1, 513, 64, 64},  {1, 1, 96, 64},
                           {1, 1, 64, 96}, {1, 1, 0, 64},  {1, 1, 64, 0},  {1, 1, 4160, 64}, {1, 1, 64, 16448}};
  for (const auto& shape : shapes) wrong += encoder_workspace(shape[0], shape[1], shape[2], shape[3]) != 0;
  EncoderRun run({1, 1, 64, 64, 1, 1, kGelu, true, 0});
  EncoderRun::Bits output;
  machine = {1, 49152, false, false};
  wrong += run.run(output) == nullptr;
  std::printf("%-26s %s\n", "refusals", wrong ? "WRONG" : "right");
  return wrong != 0;
}

}  // namespace

int main() {
  constexpr int kLarge = 233472, kMiddle = 167936, kSmall = 102400;  // shared memory of a multiprocessor
  const std::vector<Machine> all = {{1, kLarge, false, false}, {2, kSmall, true, true}, {5, kMiddle, false, false}};
  const std::vector<Machine> two = {{2, kSmall, true, false}, {5, kMiddle, false, true}};
  const std::vector<Machine> one = {{3, kLarge, false, false}};
  int failed = check_refusals();
  // Batch, length, hidden, intermediate, layers, applications, activation, half, mask.
  failed += check("32 by 24, one row", {1, 1, 64, 128, 1, 1, kGelu, true, 0}, all);
  failed += check("32 by 24, two layers", {1, 7, 64, 128, 2, 2, kGelu, false, 1}, all);
  failed += check("32 by 24, a layer thrice", {2, 16, 128, 256, 1, 3, kGeluTanh, true, 2}, all);
  failed += check("32 by 24, long sums", {1, 9, 64, 4096 + 1600, 1, 1, kRelu, false, 0}, all);
  failed += check("32 by 32", {1, 5, 64, 4096, 1, 1, kGelu, true, 0}, one);
  failed += check("64 by 24, two layers", {3, 13, 128, 256, 2, 2, kRelu, false, 2}, all);
  failed += check("64 by 24, one sequence", {1, 33, 64, 320, 1, 2, kGelu, true, 1}, two);
  failed += check("64 by 32", {1, 33, 64, 4096, 1, 1, kRelu, true, 0}, one);
  failed += check("64 by 48, 65 rows", {1, 65, 64, 128, 1, 2, kGelu, true, 0}, two);
  failed += check("64 by 48, across sequences", {3, 33, 64, 192, 2, 3, kGelu, false, 2}, two);
  failed += check("64 by 48, many keys", {1, 150, 64, 64, 1, 1, kGelu, true, 1}, all);
  failed += check("64 by 48, more columns", {2, 65, 320, 64, 1, 1, kGelu, false, 1}, one);
  failed += check("64 by 64", {1, 65, 64, 4096, 1, 1, kGelu, true, 0}, one);
  std::printf("%d failed\n", failed);
  return failed != 0;
}
