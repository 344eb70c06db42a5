// An encoder with random weights, and plain implementations of it: one in double without any rounding, and one that
// rounds to 16 bits where csrc/encoder_layers.cu does and is otherwise in float.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "encoder_launch.h"

struct EncoderCase {
  int batch, length, hidden, intermediate, layers, applications;
  fastbert::EncoderActivation activation;
  bool half;
  int masked;  // 0: no mask; 1: holes; 2: and the last sequence without any key
};

inline double rounded(double value, bool half) {
  if (half) return static_cast<double>(static_cast<_Float16>(static_cast<float>(value)));
  return wide(narrow(static_cast<float>(value)));
}

inline uint16_t bits_of(double value, bool half) {
  if (!half) return narrow(static_cast<float>(value));
  const _Float16 number = static_cast<_Float16>(static_cast<float>(value));
  uint16_t bits;
  std::memcpy(&bits, &number, 2);
  return bits;
}

inline double value_of(uint16_t bits, bool half) {
  if (!half) return wide(bits);
  _Float16 number;
  std::memcpy(&number, &bits, 2);
  return static_cast<double>(number);
}

class EncoderRun {
 public:
  using Bits = std::vector<uint16_t>;
  using Floats = std::vector<float>;
  static constexpr uint16_t kUntouched = 0x7e7e;  // what is after the end of the output

  explicit EncoderRun(const EncoderCase& c) : c_(c), random_(c.batch * 1000 + c.length) {
    const int rows = c.batch * c.length;
    for (int i = 0; i < c.layers; ++i) {
      const int sizes[4][2] = {{3 * c.hidden, c.hidden}, {c.hidden, c.hidden}, {c.intermediate, c.hidden},
                               {c.hidden, c.intermediate}};
      for (const auto& size : sizes) {
        weights_.push_back(matrix(size[0], size[1], 1.5 / std::sqrt(size[1])));
        floats_.push_back(vector(size[0], 0.0, 0.2));
      }
      for (int k = 0; k < 2; ++k) {
        floats_.push_back(vector(c.hidden, 1.0, 0.3));
        floats_.push_back(vector(c.hidden, 0.0, 0.3));
      }
    }
    input = matrix(rows, c.hidden, 1.0);
    if (c.masked) {
      mask.assign(rows, 1);
      for (int b = 0; b < c.batch; ++b)
        for (int i = 0; i < c.length; ++i) {
          const bool hole = (i * 7 + b) % 5 == 0 || i > c.length * (b + 2) / 4;
          if (hole || (c.masked == 2 && b == c.batch - 1)) mask[b * c.length + i] = 0;
        }
    }
  }

  // By the kernel; in place, if the input is to lie where the output comes.
  const char* run(Bits& output, bool in_place = false) {
    const size_t bytes = fastbert::encoder_workspace(c_.batch, c_.length, c_.hidden, c_.intermediate);
    workspace_.assign(bytes / 4 + 64, std::nanf(""));
    output.assign(input.size() + 8, kUntouched);
    if (in_place) std::copy(input.begin(), input.end(), output.begin());
    fastbert::Encoder e = {};
    for (int i = 0; i < c_.layers; ++i) {
      const Bits* w = &weights_[4 * i];
      const Floats* f = &floats_[8 * i];
      e.layers[i] = {aligned(w[0]), aligned(f[0]), aligned(w[1]), aligned(f[1]), aligned(f[4]), aligned(f[5]),
                     aligned(w[2]), aligned(f[2]), aligned(w[3]), aligned(f[3]), aligned(f[6]), aligned(f[7])};
    }
    for (int i = 0; i < c_.applications; ++i) e.layer_of[i] = static_cast<uint8_t>(i % c_.layers);
    e.applications = c_.applications;
    e.batch = c_.batch, e.length = c_.length, e.hidden = c_.hidden, e.intermediate = c_.intermediate;
    e.eps = 1e-5f;
    e.activation = c_.activation;
    e.half = c_.half;
    e.input = in_place ? output.data() : input.data();
    e.output = output.data();
    e.mask = mask.empty() ? nullptr : mask.data();
    const auto at = reinterpret_cast<uintptr_t>(workspace_.data());
    e.workspace = reinterpret_cast<void*>((at + 255) / 256 * 256);
    return fastbert::encoder_cuda(e, nullptr);
  }

  // Plainly. Number is double and nothing is rounded, or float and what is in 16 bits is rounded.
  template <class Number>
  std::vector<double> plain() const {
    using Numbers = std::vector<Number>;
    const bool rounds = sizeof(Number) == 4;
    const auto number = [](double value) { return static_cast<Number>(value); };
    const auto round16 = [&](Number value) { return rounds ? number(rounded(value, c_.half)) : value; };
    const int rows = c_.batch * c_.length, hidden = c_.hidden;
    const auto product = [&](const Numbers& x, int index, int layer, int columns, int depth) {
      std::vector<Number> w(static_cast<size_t>(columns) * depth);
      for (size_t i = 0; i < w.size(); ++i) w[i] = number(value_of(weights_[4 * layer + index][i], c_.half));
      Numbers y(static_cast<size_t>(rows) * columns);
      for (int r = 0; r < rows; ++r)
        for (int n = 0; n < columns; ++n) {
          Number sum = 0;
          for (int k = 0; k < depth; ++k) sum += x[r * depth + k] * w[n * depth + k];
          y[r * columns + n] = sum + number(floats_[8 * layer + index][n]);
        }
      return y;
    };
    const auto norm = [&](const Numbers& x, const Numbers& more, const Floats& scale, const Floats& shift) {
      Numbers y(x.size());
      for (int r = 0; r < rows; ++r) {
        Number mean = 0, square = 0;
        for (int i = r * hidden; i < (r + 1) * hidden; ++i) mean += (x[i] + more[i]) / hidden;
        for (int i = r * hidden; i < (r + 1) * hidden; ++i) {
          const Number far = x[i] + more[i] - mean;
          square += far * far / hidden;
        }
        for (int i = 0; i < hidden; ++i) {
          const Number far = x[r * hidden + i] + more[r * hidden + i] - mean;
          y[r * hidden + i] = round16(far / std::sqrt(square + number(1e-5f)) * scale[i] + shift[i]);
        }
      }
      return y;
    };
    Numbers x(static_cast<size_t>(rows) * hidden);
    for (size_t i = 0; i < x.size(); ++i) x[i] = number(value_of(input[i], c_.half));
    for (int a = 0; a < c_.applications; ++a) {
      const int layer = a % c_.layers;
      const Floats* f = &floats_[8 * layer];
      Numbers qkv = product(x, 0, layer, 3 * hidden, hidden);
      for (Number& each : qkv) each = round16(each);
      Numbers o(x.size());
      for (int r = 0; r < rows; ++r)
        for (int head = 0; head < hidden / 64; ++head) {
          const int first = r / c_.length * c_.length;
          Numbers p(c_.length);
          Number most = -INFINITY, sum = 0;
          for (int key = 0; key < c_.length; ++key) {
            Number score = 0;
            for (int i = 0; i < 64; ++i)
              score += qkv[r * 3 * hidden + head * 64 + i] * qkv[(first + key) * 3 * hidden + hidden + head * 64 + i];
            p[key] = mask.empty() || mask[first + key] ? score / 8 : number(-INFINITY);
            most = std::max(most, p[key]);
          }
          for (Number& each : p) {
            each = most == number(-INFINITY) ? 0 : std::exp(each - most);
            sum += each;
            each = round16(each);
          }
          for (int i = 0; i < 64; ++i) {
            Number value = 0;
            for (int key = 0; key < c_.length; ++key)
              value += p[key] * qkv[(first + key) * 3 * hidden + 2 * hidden + head * 64 + i];
            o[r * hidden + head * 64 + i] = round16(sum > 0 ? value / sum : 0);
          }
        }
      const Numbers y = norm(x, product(o, 1, layer, hidden, hidden), f[4], f[5]);
      Numbers h = product(y, 2, layer, c_.intermediate, hidden);
      for (Number& each : h) {
        if (c_.activation == fastbert::kRelu) each = std::max<Number>(each, 0);
        else if (c_.activation == fastbert::kGelu) each *= (1 + std::erf(each * number(0.70710678118654752))) / 2;
        else each *= (1 + std::tanh(number(0.79788456080286536) * (each + number(0.044715) * each * each * each))) / 2;
        each = round16(each);
      }
      x = norm(y, product(h, 3, layer, hidden, c_.intermediate), f[6], f[7]);
    }
    return std::vector<double>(x.begin(), x.end());
  }

  Bits input;
  std::vector<uint8_t> mask;

 private:
  Bits matrix(int rows, int columns, double scale) {
    Bits bits(static_cast<size_t>(rows) * columns);
    for (uint16_t& each : bits) each = bits_of(scale * normal_(random_), c_.half);
    return bits;
  }
  Floats vector(int count, double mean, double scale) {
    Floats values(count);
    for (float& each : values) each = static_cast<float>(mean + scale * normal_(random_));
    return values;
  }
  // The C++ library aligns what it allocates to 16 bytes.
  template <class T> static const T* aligned(const std::vector<T>& values) { return values.data(); }

  EncoderCase c_;
  std::mt19937 random_;
  std::normal_distribution<double> normal_;
  std::vector<Bits> weights_;     // [layers, 4]: qkv, out, up, down
  std::vector<Floats> floats_;    // [layers, 8]: their biases; weight and bias of each LN
  std::vector<float> workspace_;  // NaN before each run
};
