// A LAMB step's tensors and workspace without PyTorch.
#pragma once

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "lamb_launch.h"

namespace fastbert {

// Tensors of these sizes by turns in all dtypes and in two groups, of which the second does not adapt.
struct Run {
  struct Kind {
    LambType weight, copy, grad;
    bool has_copy;
  };

  std::vector<int> sizes;
  std::vector<std::vector<float>> weights, grads, copies, m, v;  // the space of two 16-bit numbers each, where they are
  std::vector<Kind> kinds;
  std::vector<float> steps;
  std::vector<int> zeroed, next;
  std::vector<float> bias;
  std::vector<LambNorms> sums, totals;
  std::vector<double> norm_sums;
  double total = 0.0;
  std::unique_ptr<LambBatch> batch = std::make_unique<LambBatch>();

  // chunk: kCpuChunk or kCudaChunk. offset: elements that every array is moved by, from an address of 64 bytes.
  Run(std::vector<int> tensors, int chunk, int offset) : sizes(std::move(tensors)), steps(sizes.size(), 2.0f) {
    std::srand(1);
    const Kind every[] = {{kFloat, kFloat, kFloat, false},         {kFloat, kHalf, kHalf, true},
                          {kFloat, kBFloat16, kBFloat16, true},    {kHalf, kHalf, kFloat, false},
                          {kBFloat16, kBFloat16, kHalf, false},    {kFloat, kFloat, kBFloat16, false}};
    for (size_t i = 0; i < sizes.size(); ++i) kinds.push_back(every[i % 6]);
    for (size_t i = 0; i < sizes.size(); ++i) {
      weights.push_back(numbers(sizes[i], kinds[i].weight, 0.1f, false, offset));
      grads.push_back(numbers(sizes[i], kinds[i].grad, 0.01f, false, offset));
      copies.push_back(numbers(sizes[i], kHalf, 0.0f, false, offset));
      m.push_back(numbers(sizes[i], kFloat, 0.01f, false, offset));
      v.push_back(numbers(sizes[i], kFloat, 0.0001f, true, offset));
    }
    totals.resize(sizes.size());
    batch->count = static_cast<int>(sizes.size());
    for (int i = 0; i < batch->count; ++i) {
      LambTensor& t = batch->tensors[i];
      t.weight = at(weights[i], kinds[i].weight, offset);
      t.copy = kinds[i].has_copy ? at(copies[i], kinds[i].copy, offset) : nullptr;
      t.grad = at(grads[i], kinds[i].grad, offset);
      t.exp_avg = static_cast<float*>(at(m[i], kFloat, offset));
      t.exp_avg_sq = static_cast<float*>(at(v[i], kFloat, offset));
      t.step = &steps[i];
      t.numel = sizes[i];
      t.first_chunk = batch->chunks;
      t.group = static_cast<uint8_t>(i % 2);
      t.weight_type = kinds[i].weight, t.copy_type = kinds[i].copy, t.grad_type = kinds[i].grad;
      t.aligned = offset == 0;
      batch->chunks += lamb_chunks(sizes[i], chunk);
    }
    batch->groups[0] = {0.9, 0.999, nullptr, 0.01f, 1e-6f, 0.01f, true, true, true};
    batch->groups[1] = {0.9, 0.99, nullptr, 0.01f, 1e-6f, 0.0f, true, false, false};
    batch->items = lamb_items(batch->chunks);
    batch->max_grad_norm = 1e9;  // so that the order of sums is not in the moments
    next.resize(batch->chunks);
    sums.resize(batch->chunks);
    norm_sums.resize(batch->items);
    bias.resize(2 * sizes.size());
  }

  void begin() {
    zeroed.assign(6 + 2 * batch->count, 0);
    int* memory = zeroed.data();
    batch->work = {memory + 2,  memory,      memory + 6,       memory + 6 + batch->count, bias.data(),
                   next.data(), sums.data(), norm_sums.data(), &total,                    totals.data()};
  }

  static void* at(std::vector<float>& space, LambType type, int offset) {
    const auto address = (reinterpret_cast<uintptr_t>(space.data()) + 63) / 64 * 64;
    return reinterpret_cast<void*>(address + offset * (type == kFloat ? 4 : 2));
  }

 private:
  // Between -scale and scale, or from 0 to twice the scale.
  static std::vector<float> numbers(int size, LambType type, float scale, bool positive, int offset) {
    std::vector<float> space(size + offset + 32);
    for (int i = 0; i < size; ++i) {
      const float value = scale * static_cast<float>(std::rand() % 127 - (positive ? 0 : 63)) / 64.0f;
      if (type == kFloat) {
        static_cast<float*>(at(space, kFloat, offset))[i] = value;
        continue;
      }
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const auto half = static_cast<_Float16>(value);
      uint16_t narrow = static_cast<uint16_t>(bits >> 16);
      if (type == kHalf) std::memcpy(&narrow, &half, 2);
      static_cast<uint16_t*>(at(space, type, offset))[i] = narrow;
    }
    return space;
  }
};

}  // namespace fastbert
