// LAMB on the CPU: every thread is a block of one thread, and its loops over a chunk are vector code.
#include <atomic>
#include <cstring>
#include <thread>

#include "lamb_launch.h"

// Compiled once per vector width, and the loader picks: a build made on one machine runs on another, as wide as it can.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__SANITIZE_THREAD__)
#define FASTBERT_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTBERT_VECTOR_CLONES
#endif

// Before a loop whose iterations touch different memory.
#define FASTBERT_INDEPENDENT _Pragma("GCC ivdep")

namespace fastbert {
namespace {

constexpr int kSumRun = 256;  // elements whose squares are added in float before the sum goes on in double

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_half(uint16_t half) {
  const uint32_t exponent = half & 0x7c00u, rest = (half & 0x7fffu) << 13;
  const float small = static_cast<float>(static_cast<int>(half & 0x3ffu)) * 0x1p-24f;
  const uint32_t bias = exponent == 0x7c00u ? 224u << 23 : 112u << 23;
  const uint32_t magnitude = exponent == 0 ? as_bits(small) : rest + bias;
  return as_float(magnitude | (half & 0x8000u) << 16);
}

inline uint16_t to_half(float value) {  // to nearest, ties to even
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  const uint32_t small = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // the sum has the spacing of halves
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x47800000u ? large : magnitude < 0x38800000u ? small : normal;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

inline float from_bfloat16(uint16_t value) { return as_float(static_cast<uint32_t>(value) << 16); }

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

FASTBERT_VECTOR_CLONES void widen(const uint16_t* __restrict__ source, bool half, float* __restrict__ target, int n) {
  if (half) {
    FASTBERT_INDEPENDENT
    for (int i = 0; i < n; ++i) target[i] = from_half(source[i]);
  } else {
    FASTBERT_INDEPENDENT
    for (int i = 0; i < n; ++i) target[i] = from_bfloat16(source[i]);
  }
}

FASTBERT_VECTOR_CLONES void narrow(const float* __restrict__ source, bool half, uint16_t* __restrict__ target, int n) {
  if (half) {
    FASTBERT_INDEPENDENT
    for (int i = 0; i < n; ++i) target[i] = to_half(source[i]);
  } else {
    FASTBERT_INDEPENDENT
    for (int i = 0; i < n; ++i) target[i] = to_bfloat16(source[i]);
  }
}

// Sums are added in the same order whatever vectors the machine has.
typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));
typedef float HalfOfFloats __attribute__((vector_size(16)));

inline __attribute__((always_inline)) Floats squares_at(const float* x, Floats) {
  Floats some;
  std::memcpy(&some, x, sizeof some);
  return some * some;
}

inline __attribute__((always_inline)) Doubles squares_at(const float* x, Doubles) {
  HalfOfFloats some;
  std::memcpy(&some, x, sizeof some);
  const Doubles wide = __builtin_convertvector(some, Doubles);
  return wide * wide;
}

template <class Sum>
inline __attribute__((always_inline)) double sum_of_squares(const float* x, int n) {
  constexpr int kStep = sizeof(Sum) / sizeof(Sum{}[0]);
  Sum a = {}, b = {}, c = {}, d = {};
  int i = 0;
  for (; i + 4 * kStep <= n; i += 4 * kStep) {
    a += squares_at(x + i, Sum{});
    b += squares_at(x + i + kStep, Sum{});
    c += squares_at(x + i + 2 * kStep, Sum{});
    d += squares_at(x + i + 3 * kStep, Sum{});
  }
  a = (a + b) + (c + d);
  double sum = 0.0;
  for (int lane = 0; lane < kStep; ++lane) sum += a[lane];
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

// In float, which is twice as fast, unless the squares may not fit.
FASTBERT_VECTOR_CLONES double squares_of(const float* x, int n) {
  double sum = 0.0;
  for (int start = 0; start < n; start += kSumRun)
    sum += sum_of_squares<Floats>(x + start, n - start < kSumRun ? n - start : kSumRun);
  return sum > 1e-20 && sum < 1e30 ? sum : sum_of_squares<Doubles>(x, n);
}

// New moments and the sums of squares; u too, unless it is null.
FASTBERT_VECTOR_CLONES LambNorms moments_of(const LambScalars& scalars, const float* __restrict__ g,
                                            float* __restrict__ m, float* __restrict__ v, const float* __restrict__ w,
                                            float* u, int n) {
  const LambScalars s = scalars;
  LambNorms sums = {0.0, 0.0};
  float space[kSumRun];
  for (int done = 0; done < n;) {
    const int run = n - done < kSumRun ? n - done : kSumRun;
    float* __restrict__ some = u == nullptr ? space : u + done;
    FASTBERT_INDEPENDENT
    for (int i = 0; i < run; ++i) {
      float new_m = m[i], new_v = v[i];
      lamb_moments(s, g[i], new_m, new_v);
      m[i] = new_m;
      v[i] = new_v;
      some[i] = lamb_update(s, w[i], new_m, new_v);
    }
    sums.weight += sum_of_squares<Floats>(w, run);
    sums.update += sum_of_squares<Floats>(some, run);
    g += run, m += run, v += run, w += run, done += run;
  }
  return sums;
}

FASTBERT_VECTOR_CLONES void update(const LambScalars& scalars, const float* __restrict__ m,
                                   const float* __restrict__ v, float* __restrict__ w, float scale, int n) {
  const LambScalars s = scalars;
  FASTBERT_INDEPENDENT
  for (int i = 0; i < n; ++i) w[i] -= scale * lamb_update(s, w[i], m[i], v[i]);
}

FASTBERT_VECTOR_CLONES void subtract(float* __restrict__ w, const float* __restrict__ u, float scale, int n) {
  FASTBERT_INDEPENDENT
  for (int i = 0; i < n; ++i) w[i] -= scale * u[i];
}

std::atomic<int>& atomic(int* counter) { return *reinterpret_cast<std::atomic<int>*>(counter); }
static_assert(sizeof(std::atomic<int>) == sizeof(int) && std::atomic<int>::is_always_lock_free);

class CpuBlock {
 public:
  static constexpr int kChunk = kCpuChunk;

  bool leader() const { return true; }
  int rank() const { return 0; }
  int size() const { return 1; }
  int claim(int* counter) { return atomic(counter).fetch_add(1, std::memory_order_relaxed); }
  int arrive(int* counter) { return atomic(counter).fetch_add(1, std::memory_order_acq_rel); }
  int ask(const int* const (&flags)[kSlots + 1]) {
    int ready = 0;
    for (int i = 0; i <= kSlots; ++i)
      if (flags[i] != nullptr && is_set(flags[i])) ready |= 1 << i;
    return ready;
  }
  unsigned answer(int asked) { return asked; }
  bool is_set(const int* flag) { return atomic(const_cast<int*>(flag)).load(std::memory_order_acquire); }
  void set(int* flag) { atomic(flag).store(1, std::memory_order_release); }
  void relax() { std::this_thread::yield(); }
  double fresh(const double* address) { return *address; }
  LambPlan& next() { return plans_[turn_ ^ 1]; }
  const LambPlan& flip() { return plans_[turn_ ^= 1]; }
  template <class T>
  T sum(T value) {
    return value;
  }

  double squares(const LambBatch& batch, int first, int last) {
    double sum = 0.0;
    for (int chunk = first, tensor = lamb_tensor_of(batch, first); chunk < last; ++chunk) {
      if (chunk == lamb_end(batch, tensor)) ++tensor;
      const LambPart part = lamb_part<kChunk>(batch, chunk, tensor);
      sum += squares_of(load(batch.tensors[tensor].grad, batch.tensors[tensor].grad_type, part, grads_), part.n);
    }
    return sum;
  }

  LambNorms moments(const LambScalars& s, const LambTensor& t, LambPart part, int slot, bool at_once, float lr) {
    const float* g = load(t.grad, t.grad_type, part, grads_);
    float* w = load(t.weight, t.weight_type, part, weights_);
    float* u = slot >= 0 ? slots_[slot] : at_once ? updates_ : nullptr;
    const LambNorms sums = moments_of(s, g, t.exp_avg + part.start, t.exp_avg_sq + part.start, w, u, part.n);
    if (at_once) {
      subtract(w, u, lr, part.n);
      store(t, part, w);
    }
    return sums;
  }

  void apply_kept(const LambTensor& t, LambPart part, int slot, float scale) {
    float* w = load(t.weight, t.weight_type, part, weights_);  // that is in cache still, or converted again
    subtract(w, slots_[slot], scale, part.n);
    store(t, part, w);
  }

  void apply(const LambScalars& s, const LambTensor& t, LambPart part, float scale) {
    float* w = load(t.weight, t.weight_type, part, weights_);
    update(s, t.exp_avg + part.start, t.exp_avg_sq + part.start, w, scale, part.n);
    store(t, part, w);
  }

 private:
  // The part's elements as floats: where they are, or converted into `space`.
  float* load(const void* data, int type, LambPart part, float* space) {
    if (type == kFloat) return const_cast<float*>(static_cast<const float*>(data)) + part.start;
    widen(static_cast<const uint16_t*>(data) + part.start, type == kHalf, space, part.n);
    return space;
  }

  // Weights that were changed where load() found them.
  void store(const LambTensor& t, LambPart part, const float* w) {
    if (t.weight_type != kFloat)
      narrow(w, t.weight_type == kHalf, static_cast<uint16_t*>(t.weight) + part.start, part.n);
    if (t.copy != nullptr) narrow(w, t.copy_type == kHalf, static_cast<uint16_t*>(t.copy) + part.start, part.n);
  }

  LambPlan plans_[2];
  int turn_ = 0;
  alignas(64) float grads_[kChunk], weights_[kChunk], updates_[kChunk], slots_[kSlots][kChunk];
};

}  // namespace

void lamb_cpu(LambBatch& batch, int phases, int threads, const ParallelFor& parallel_for) {
  batch.slots = kSlots;
  const int blocks = batch.chunks < threads ? batch.chunks : threads;
  parallel_for(blocks, [&](int64_t begin, int64_t end) {
    const auto block = std::make_unique<CpuBlock>();
    for (int64_t i = begin; i < end; ++i) lamb_run(*block, batch, phases);
  });
}

}  // namespace fastbert
