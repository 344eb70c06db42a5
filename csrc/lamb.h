// The LAMB step, per element and per chunk: the one place with its mathematics, compiled for the host and the device.
//
// LAMB as apex's FusedLAMB states it (You et al., arXiv 1904.00962, algorithm 2), for one tensor at step t:
//   g = grad / grad_scale
//   m = beta1 m + beta3 g          u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p
//   v = beta2 v + (1 - beta2) g^2  p = p - lr ratio u
// ratio = |p| / |u| where both norms are non-zero, else 1; always 1 without adaptation.
//
// A tensor is cut into chunks. `lamb_moments` runs over one chunk with a team (a CUDA block, or a CPU thread, which is
// a team of one) and leaves each member's own sums of p^2 and u^2; `lamb_apply` runs over the chunk again once the
// ratio is known. u is computed twice rather than stored: arithmetic is free next to memory. The sums are double, so
// the cutting does not show in the result and no square overflows. Both compilers are told not to fuse products with
// sums: the moments of a CPU and of a GPU are the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

// FASTBERT_INDEPENDENT stands before a loop whose iterations touch different memory: unroll it on the device, make it
// vector code on the host.
#ifdef __CUDACC__
#define FASTBERT_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTBERT_INDEPENDENT _Pragma("unroll")
#else
#define FASTBERT_HOST_DEVICE inline __attribute__((always_inline))
#define FASTBERT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace fastbert {

// Elements per chunk: the unit of work of a block or of a CPU thread, and the grain of the two-stage norms.
constexpr int64_t kLambChunk = 32768;

inline int64_t lamb_chunks(int64_t numel) { return (numel + kLambChunk - 1) / kLambChunk; }

// The scalars of one step, derived in double by `make_lamb_step` and rounded once.
struct LambStep {
  float beta1, beta2, beta3, gamma2;  // beta3: the weight of g in m; gamma2 = 1 - beta2
  float inv_bias1, inv_bias2;         // 1 / (1 - beta^t), or 1 without bias correction
  float eps, weight_decay, lr, inv_grad_scale;
  bool adapt;  // whether the step is scaled by the trust ratio |p| / |u|
};

// One tensor of the group: fp32, contiguous, all four of the same size and none overlapping another.
struct LambTensor {
  float* param;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t numel;
};

struct LambNorms {
  double param, update;  // sums of squares
};

inline LambStep make_lamb_step(int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
                               bool bias_correction, bool grad_averaging, bool always_adapt, double grad_scale) {
  const double t = static_cast<double>(step);
  LambStep s;
  s.beta1 = static_cast<float>(beta1);
  s.beta2 = static_cast<float>(beta2);
  s.beta3 = static_cast<float>(grad_averaging ? 1.0 - beta1 : 1.0);
  s.gamma2 = static_cast<float>(1.0 - beta2);
  s.inv_bias1 = static_cast<float>(bias_correction ? 1.0 / (1.0 - std::pow(beta1, t)) : 1.0);
  s.inv_bias2 = static_cast<float>(bias_correction ? 1.0 / (1.0 - std::pow(beta2, t)) : 1.0);
  s.eps = static_cast<float>(eps);
  s.weight_decay = static_cast<float>(weight_decay);
  s.lr = static_cast<float>(lr);
  s.inv_grad_scale = static_cast<float>(1.0 / grad_scale);
  s.adapt = always_adapt || weight_decay != 0.0;
  return s;
}

FASTBERT_HOST_DEVICE float lamb_update(LambStep s, float p, float m, float v) {
  return (m * s.inv_bias1) / (sqrtf(v * s.inv_bias2) + s.eps) + s.weight_decay * p;
}

FASTBERT_HOST_DEVICE double lamb_ratio(LambNorms sums) {
  // Asked with ==, so that a NaN or infinite norm reaches every element instead of hiding behind ratio 1.
  return sums.param == 0.0 || sums.update == 0.0 ? 1.0 : std::sqrt(sums.param) / std::sqrt(sums.update);
}

// Calls body(i, lane) once for every element i in [0, n) that falls to member `rank` of a team of `size`. The members
// take neighbouring elements, so that a GPU's loads coalesce; each has LANES elements at a time, which are the lanes of
// a CPU's vector or the loads that a GPU thread has in flight.
template <int LANES, class Body>
FASTBERT_HOST_DEVICE void for_each_element(int rank, int size, int64_t n, const Body& body) {
  const int64_t stride = static_cast<int64_t>(LANES) * size;
  int64_t base = 0;
  for (; base + stride <= n; base += stride) {
    FASTBERT_INDEPENDENT
    for (int lane = 0; lane < LANES; ++lane) body(base + lane * size + rank, lane);
  }
  for (int64_t i = base + rank; i < n; i += size) body(i, 0);
}

// First pass over n <= kLambChunk elements: the new moments, and this member's share of the sums of squares.
template <int LANES>
FASTBERT_HOST_DEVICE LambNorms lamb_moments(LambStep s, LambTensor t, int64_t start, int64_t n, int rank, int size) {
  const float* __restrict__ p = t.param + start;
  const float* __restrict__ g = t.grad + start;
  float* __restrict__ m = t.exp_avg + start;
  float* __restrict__ v = t.exp_avg_sq + start;
  double param[LANES] = {}, update[LANES] = {};
  for_each_element<LANES>(rank, size, n, [&](int64_t i, int lane) {
    const float scaled = g[i] * s.inv_grad_scale;
    const float new_m = s.beta1 * m[i] + s.beta3 * scaled;
    const float new_v = s.beta2 * v[i] + s.gamma2 * (scaled * scaled);
    const double u = lamb_update(s, p[i], new_m, new_v);
    m[i] = new_m;
    v[i] = new_v;
    param[lane] += static_cast<double>(p[i]) * p[i];
    update[lane] += u * u;
  });
  LambNorms sums = {0.0, 0.0};
  for (int lane = 0; lane < LANES; ++lane) {
    sums.param += param[lane];
    sums.update += update[lane];
  }
  return sums;
}

// Second pass: p -= lr ratio u, from the new moments.
template <int LANES>
FASTBERT_HOST_DEVICE void lamb_apply(LambStep s, LambTensor t, float ratio, int64_t start, int64_t n, int rank,
                                     int size) {
  float* __restrict__ p = t.param + start;
  const float* __restrict__ m = t.exp_avg + start;
  const float* __restrict__ v = t.exp_avg_sq + start;
  const float scale = s.lr * ratio;
  for_each_element<LANES>(rank, size, n, [&](int64_t i, int) { p[i] -= scale * lamb_update(s, p[i], m[i], v[i]); });
}

// Launchers. `group` holds no empty tensors.

// Runs body(begin, end) over parts of [0, count), possibly in parallel; returns when all are done.
using Range = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, const Range& body)>;

void lamb_cpu(const LambStep& step, const std::vector<LambTensor>& group, const ParallelFor& parallel_for);

// Launches on `stream` (a cudaStream_t) of `device`, which must be current, and returns at once: nullptr, or what CUDA
// says is wrong. `sums` is scratch memory on the device, one entry per chunk of the group.
const char* lamb_cuda(const LambStep& step, const std::vector<LambTensor>& group, LambNorms* sums, int device,
                      void* stream);

}  // namespace fastbert
