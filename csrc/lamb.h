// The LAMB step: its mathematics per element and its course over the tensors, once, compiled for the host and the
// device. What differs between the two, how a block of threads loads, sums and synchronises, is in lamb.cu and
// lamb_cpu.cpp.
//
// LAMB as apex's FusedLAMB states it (You et al., arXiv 1904.00962, algorithm 2), for one tensor at step t, with G the
// norm of all gradients of all groups, both divided by the loss scale s:
//   g = grad / (s max(1, G / max_grad_norm))
//   m = beta1 m + beta3 g          u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
//   v = beta2 v + (1 - beta2) g^2  w = w - lr ratio u
// ratio = |w| / |u| where both norms are non-zero, else 1; always 1 without adaptation. w is the parameter, or the
// float32 master of a 16-bit one, which is written in the same pass. Where any gradient is not finite, or found_inf is
// set, nothing is written at all.
//
// The course. Tensors are cut into chunks; blocks claim them in order by tickets.
//   norm     Sums of squares of the gradients, over kNormChunks chunks at a time, from the last chunk to the first, so
//            that the first gradients are still in cache when they are read again. The block that arrives last adds the
//            sums in their order.
//   moments  Chunk by chunk: new m and v, sums of w^2 and u^2. Whoever arrives last at a tensor adds its sums.
//   apply    w -= lr ratio u, by the block that did the moments, when it next looks and the ratio is there. It has kept
//            u and w on chip if it had a slot free, else it reads m, v and w again and has the same bits.
// A block waits in two places: before its first moments for the norm, and at its very end for the ratios. What it then
// waits for is in the hands of blocks that already run and wait for nothing themselves, because the tickets are handed
// out in order. So it ends with any number of blocks, running in any order or one after the other: no cooperative
// launch, no barrier. The sums depend on the chunks alone: the result does not depend on which block did what.
//
// Both compilers are told not to fuse products with sums, so that the moments of a CPU and of a GPU are the same bits
// (the norms are added in another order).
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTBERT_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTBERT_UNROLL _Pragma("unroll")
#define FASTBERT_NO_UNROLL _Pragma("unroll 1")
#else
#define FASTBERT_HOST_DEVICE inline __attribute__((always_inline))
#define FASTBERT_UNROLL
#define FASTBERT_NO_UNROLL
#endif

namespace fastbert {

constexpr int kCudaChunk = 2048;  // elements: 8 for each of the 256 threads of a block
constexpr int kCpuChunk = 16384;  // long enough for the processor to fetch ahead
constexpr int kNormChunks = 16;   // chunks per ticket of the norm, of whose elements little more than 2 bytes are read
constexpr int kSlots = 4;         // chunks whose u and w a block can keep, at most
constexpr int kBatch = 440;       // tensors and groups of one launch: what 32,764 bytes of kernel arguments can name
constexpr int kGroups = 64;

enum LambType : uint8_t { kFloat, kHalf, kBFloat16 };
enum LambPhase { kNorm = 1, kMoments = 2, kApply = 4 };

// Contiguous, all of numel elements, none overlapping another.
struct LambTensor {
  void* weight;      // of weight_type: the parameter, or its float32 master
  void* copy;        // of copy_type: the parameter of a master, else null
  const void* grad;  // of grad_type
  float *exp_avg, *exp_avg_sq;
  float* step;  // steps that were made
  int64_t numel;
  int first_chunk;  // of the batch
  uint8_t group;
  uint8_t weight_type : 2, copy_type : 2, grad_type : 2, aligned : 1;  // aligned: all of them, to 16 bytes
};

struct LambGroup {
  double beta1, beta2;
  const float* lr_pointer;  // null: lr
  float lr, eps, weight_decay;
  bool bias_correction, grad_averaging, adapt;  // adapt: whether the trust ratio applies
};

struct LambNorms {
  double weight, update;  // sums of squares
};

// Memory of one step. Everything up to `bias` is zero before the norm begins.
struct LambWork {
  int* tickets;     // [3] norm, moments, apply
  int* norm_state;  // [2] of the whole step: items that have arrived, whether the sum is there
  int* arrived;     // [tensors] chunks whose moments have arrived
  int* ready;       // [tensors] whether the ratio is there
  float* bias;      // [tensors, 2] 1 / (1 - beta^t), or 1 without bias correction
  int* next;        // [chunks] of a chunk without a slot, the one that its block put aside before it, or -1
  LambNorms* sums;  // [chunks]
  double* norm_sums;  // [items of the whole step]
  double* total;      // of the whole step: the sum of squares of all gradients, times the square of the loss scale
  LambNorms* totals;  // [tensors]
};

struct LambBatch {
  LambTensor tensors[kBatch];
  LambGroup groups[kGroups];
  LambWork work;
  int count, chunks;           // tensors and chunks here
  int first_item, items;       // items of the norm before this batch, and in the whole step
  int slots;                   // that a block has: 0 to kSlots
  const float *grad_scale, *found_inf;  // null: 1 and 0
  double max_grad_norm;                 // infinite: no clipping
};

// Chunks of a tensor; one at least, so that an empty one makes its steps too.
FASTBERT_HOST_DEVICE int lamb_chunks(int64_t numel, int chunk) {
  return numel <= chunk ? 1 : static_cast<int>((numel + chunk - 1) / chunk);
}

FASTBERT_HOST_DEVICE int lamb_items(int chunks) { return (chunks + kNormChunks - 1) / kNormChunks; }

// ---------------------------------------------------------------- per element

// What an element of one tensor needs to know; derived in double where it matters and rounded once.
struct LambScalars {
  float gamma1, beta3, gamma2;  // 1 - beta1, the weight of g in m, 1 - beta2
  float inv_bias1, inv_bias2, eps, weight_decay, inv_scale;
};

FASTBERT_HOST_DEVICE LambScalars lamb_scalars(const LambGroup& group, const float* bias, float inv_scale) {
  LambScalars s;
  s.gamma1 = static_cast<float>(1.0 - group.beta1);
  s.beta3 = group.grad_averaging ? static_cast<float>(1.0 - group.beta1) : 1.0f;
  s.gamma2 = static_cast<float>(1.0 - group.beta2);
  s.inv_bias1 = bias[0];
  s.inv_bias2 = bias[1];
  s.eps = group.eps;
  s.weight_decay = group.weight_decay;
  s.inv_scale = inv_scale;
  return s;
}

FASTBERT_HOST_DEVICE void lamb_moments(const LambScalars& s, float grad, float& m, float& v) {
  // From m and v, not from beta m and beta v: 0.999 in float would make v 1.3e-5 too large in the long run.
  const float g = grad * s.inv_scale;
  m = s.beta3 * g + (m - s.gamma1 * m);  // of an m that beta1 = 0 forgets, no rounding is left
  v += s.gamma2 * (g * g - v);
}

FASTBERT_HOST_DEVICE float lamb_update(const LambScalars& s, float w, float m, float v) {
  return (m * s.inv_bias1) / (sqrtf(v * s.inv_bias2) + s.eps) + s.weight_decay * w;
}

// ---------------------------------------------------------------- per tensor and per step

FASTBERT_HOST_DEVICE float lamb_ratio(const LambGroup& group, LambNorms sums) {
  // Asked with ==, so that a NaN or infinite norm reaches every element instead of hiding behind ratio 1.
  const bool one = !group.adapt || sums.weight == 0.0 || sums.update == 0.0;
  return one ? 1.0f : static_cast<float>(sqrt(sums.weight) / sqrt(sums.update));
}

// What the gradients are multiplied by; NaN where the step must not be made.
FASTBERT_HOST_DEVICE float lamb_inv_scale(const LambBatch& batch) {
  const double sum = *batch.work.total;
  const bool stop = !(sum <= 1.7976931348623157e308) || (batch.found_inf != nullptr && *batch.found_inf != 0.0f);
  const double scale = batch.grad_scale == nullptr ? 1.0 : static_cast<double>(*batch.grad_scale);
  const bool sound = scale > 0.0 && scale <= 3.4e38;
  const double clip = sqrt(sum) / scale / batch.max_grad_norm;
  return stop || !sound ? NAN : static_cast<float>(1.0 / (scale * (clip > 1.0 ? clip : 1.0)));
}

FASTBERT_HOST_DEVICE int lamb_tensor_of(const LambBatch& batch, int chunk) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.tensors[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return low;
}

FASTBERT_HOST_DEVICE int lamb_end(const LambBatch& batch, int tensor) {  // the chunk after its last
  return tensor + 1 < batch.count ? batch.tensors[tensor + 1].first_chunk : batch.chunks;
}

// One chunk: elements start to start + n of a tensor.
struct LambPart {
  int64_t start;
  int n;
};

template <int kElements>  // of a chunk
FASTBERT_HOST_DEVICE LambPart lamb_part(const LambBatch& batch, int chunk, int tensor) {
  const int64_t start = static_cast<int64_t>(chunk - batch.tensors[tensor].first_chunk) * kElements;
  const int64_t left = batch.tensors[tensor].numel - start;
  return {start, static_cast<int>(left < kElements ? left : kElements)};
}

FASTBERT_HOST_DEVICE float lamb_inv_bias(const LambGroup& group, double beta, double step) {
  return group.bias_correction ? static_cast<float>(1.0 / (1.0 - pow(beta, step))) : 1.0f;
}

// ---------------------------------------------------------------- the course of a block
//
// A Block has threads, of which one is the leader(). All threads call its functions together, except where it says
// leader. What the leader decides stands in plans, two by turns, so that one barrier between them is enough.
//   leader(), rank(), size(), kChunk
//   next()                  leader: the plan to write
//   flip()                  makes it the plan to follow, and returns it
//   claim(counter)          leader: the old value of a counter that is raised by one
//   arrive(counter)         leader: the same, after everything that it wrote before is there for others
//   ask(flags)              asks for the flags whose addresses are not null
//   answer(asked)           leader: which of them are set, as bits; what was written before that is there
//   is_set(flag), set(flag) leader: the same of one, at once; sets one, after everything that it wrote before
//   relax()                 leader: before it looks again
//   fresh(address)          a number that another block may have written just now
//   sum(value)              for the leader, over the threads in a fixed order: LambNorms or double
//   squares(batch, first, last)                the thread's share in the squares of these chunks' gradients
//   moments(scalars, tensor, part, slot, at_once, lr)   the thread's share in the norms. u and w go to the slot unless
//                                              it is -1; at_once: w -= lr u here and now
//   apply_kept(tensor, part, slot, scale)      w -= scale u
//   apply(scalars, tensor, part, scale)        the same from m, v and w

struct LambWait {  // a chunk whose update waits for the ratio of its tensor, or -1
  int chunk, tensor;
};

struct LambPlan {
  int ticket;    // the chunk, or item of the norm, to do
  int tensor;    // its tensor
  int slot;      // where to keep u and w, or -1
  int finished;  // the tensor whose sums are all there and are to be added by this block, or -1
  bool leave;    // nothing is left after what this plan says
  LambWait waits[kSlots + 1];  // what the slots hold, and the chunk put aside last
  unsigned known;              // bits of `waits` whose scale, lr ratio, is known: to be applied now
  float scales[kSlots + 1];
};

template <class Block>
FASTBERT_HOST_DEVICE void lamb_norm(Block& block, const LambBatch& batch) {
  const LambWork& work = batch.work;
  const int items = lamb_items(batch.chunks);
  if (block.leader()) {
    block.next().ticket = block.claim(work.tickets);
    block.next().finished = -1;
  }
  for (;;) {
    const LambPlan& now = block.flip();
    if (now.finished >= 0) {
      double share = 0.0;
      for (int i = block.rank(); i < batch.items; i += block.size()) share += block.fresh(work.norm_sums + i);
      const double total = block.sum(share);
      if (block.leader()) {
        *work.total = total;
        block.set(work.norm_state + 1);
      }
    }
    if (now.ticket >= items) return;
    int claimed = 0;
    if (block.leader()) claimed = block.claim(work.tickets);
    // The bias corrections are shared out in passing, two per tensor, whatever chunks a thread has.
    const int per_item = (2 * batch.count + items - 1) / items;
    for (int i = now.ticket * per_item + block.rank(); i < (now.ticket + 1) * per_item; i += block.size()) {
      if (i >= 2 * batch.count) break;
      const LambGroup& group = batch.groups[batch.tensors[i / 2].group];
      work.bias[i] = lamb_inv_bias(group, i % 2 ? group.beta2 : group.beta1, *batch.tensors[i / 2].step + 1.0);
    }
    const int item = items - 1 - now.ticket;
    const int first = item * kNormChunks;
    const int last = first + kNormChunks < batch.chunks ? first + kNormChunks : batch.chunks;
    const double sum = block.sum(block.squares(batch, first, last));
    if (!block.leader()) continue;
    work.norm_sums[batch.first_item + item] = sum;
    block.next().ticket = claimed;
    block.next().finished = block.arrive(work.norm_state) == batch.items - 1 ? 0 : -1;
  }
}

FASTBERT_HOST_DEVICE float lamb_lr(const LambGroup& group) {
  return group.lr_pointer == nullptr ? group.lr : *group.lr_pointer;
}

// Leader: lr ratio, where the totals of the tensor are there.
template <class Block>
FASTBERT_HOST_DEVICE float lamb_scale(Block& block, const LambBatch& batch, int tensor) {
  const LambNorms* total = batch.work.totals + tensor;
  const LambGroup& group = batch.groups[batch.tensors[tensor].group];
  return lamb_lr(group) * lamb_ratio(group, {block.fresh(&total->weight), block.fresh(&total->update)});
}

template <class Block>
FASTBERT_HOST_DEVICE void lamb_finish(Block& block, const LambBatch& batch, int tensor) {
  const LambWork& work = batch.work;
  LambNorms share = {0.0, 0.0};
  const int end = lamb_end(batch, tensor);
  for (int i = batch.tensors[tensor].first_chunk + block.rank(); i < end; i += block.size()) {
    share.weight += block.fresh(&work.sums[i].weight);
    share.update += block.fresh(&work.sums[i].update);
  }
  const LambNorms total = block.sum(share);
  if (block.leader()) {
    work.totals[tensor] = total;
    *batch.tensors[tensor].step += 1.0f;
    block.set(work.ready + tensor);
  }
}

// Leader: the plan after `now`, whose chunk, if `keeps`, waits from here on. `ready` are the bits of the flags.
template <class Block>
FASTBERT_HOST_DEVICE void lamb_plan(Block& block, const LambBatch& batch, const LambPlan& now, bool keeps,
                                    unsigned ready, int ticket) {
  LambPlan& then = block.next();
  then.finished = -1;
  then.known = ready;
  then.slot = -1;
  int waiting = 0;
  FASTBERT_NO_UNROLL
  for (int i = kSlots; i >= 0; --i) {
    LambWait wait = now.waits[i];
    if (now.known >> i & 1) wait = {i == kSlots ? batch.work.next[wait.chunk] : -1, -1};
    if (keeps && i == now.slot) wait = {now.ticket, now.tensor};
    if (i == kSlots && keeps && now.slot < 0) {
      batch.work.next[now.ticket] = wait.chunk;
      wait = {now.ticket, now.tensor};
      then.known &= ~(1u << i);  // that was said of the one put aside before
    } else if (i == kSlots && now.known >> i & 1 && wait.chunk >= 0) {
      wait.tensor = lamb_tensor_of(batch, wait.chunk);
    }
    then.waits[i] = wait;
    const bool is_known = then.known >> i & 1;
    if (is_known) then.scales[i] = lamb_scale(block, batch, wait.tensor);
    if (i < batch.slots && (is_known || wait.chunk < 0)) then.slot = i;
    const bool others = i == kSlots && is_known && batch.work.next[wait.chunk] >= 0;
    waiting += (wait.chunk >= 0 && !is_known) || others;
  }
  then.ticket = ticket;
  then.leave = ticket >= batch.chunks && waiting == 0;
  if (ticket < batch.chunks) then.tensor = lamb_tensor_of(batch, ticket);
}

template <class Block>
FASTBERT_HOST_DEVICE void lamb_step(Block& block, const LambBatch& batch, int phases) {
  const LambWork& work = batch.work;
  if (block.leader()) {
    while (phases & kNorm && !block.is_set(work.norm_state + 1)) block.relax();
    LambPlan& first = block.next();
    FASTBERT_UNROLL
    for (int i = 0; i <= kSlots; ++i) first.waits[i] = {-1, -1};
    first.ticket = block.claim(work.tickets + 1);
    first.tensor = first.ticket < batch.chunks ? lamb_tensor_of(batch, first.ticket) : -1;
    first.slot = batch.slots > 0 ? 0 : -1;
    first.finished = -1;
    first.known = 0;
    first.leave = first.ticket >= batch.chunks;
  }
  const LambPlan* plan = &block.flip();
  const float inv_scale = lamb_inv_scale(batch);
  if (std::isnan(inv_scale)) return;
  for (;; plan = &block.flip()) {
    const LambPlan& now = *plan;
    if (now.finished >= 0) lamb_finish(block, batch, now.finished);
    FASTBERT_NO_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      if (!(now.known >> i & 1)) continue;
      const LambWait wait = now.waits[i];
      const LambPart part = lamb_part<Block::kChunk>(batch, wait.chunk, wait.tensor);
      block.apply_kept(batch.tensors[wait.tensor], part, i, now.scales[i]);
    }
    if (now.known >> kSlots & 1) {
      const LambWait wait = now.waits[kSlots];
      const LambTensor& tensor = batch.tensors[wait.tensor];
      const LambScalars s = lamb_scalars(batch.groups[tensor.group], work.bias + 2 * wait.tensor, inv_scale);
      block.apply(s, tensor, lamb_part<Block::kChunk>(batch, wait.chunk, wait.tensor), now.scales[kSlots]);
    }
    if (now.leave) return;
    const int* flags[kSlots + 1];
    FASTBERT_UNROLL
    for (int i = 0; i <= kSlots; ++i) {
      const bool asks = now.waits[i].chunk >= 0 && !(now.known >> i & 1);
      flags[i] = asks ? work.ready + now.waits[i].tensor : nullptr;
    }
    const int asked = block.ask(flags);  // and looked at after the moments, so that nobody waits for it
    if (now.ticket >= batch.chunks) {
      const unsigned ready = block.answer(asked);
      if (!block.leader()) continue;
      if (!ready) block.relax();
      lamb_plan(block, batch, now, false, ready, now.ticket);
      continue;
    }
    int claimed = 0;
    if (block.leader()) claimed = block.claim(work.tickets + 1);
    const LambTensor& tensor = batch.tensors[now.tensor];
    const LambGroup& group = batch.groups[tensor.group];
    const LambPart part = lamb_part<Block::kChunk>(batch, now.ticket, now.tensor);
    const LambScalars s = lamb_scalars(group, work.bias + 2 * now.tensor, inv_scale);
    const bool keeps = phases & kApply && group.adapt;
    const bool at_once = phases & kApply && !group.adapt;
    const LambNorms norms = block.sum(block.moments(s, tensor, part, keeps ? now.slot : -1, at_once, lamb_lr(group)));
    const unsigned ready = block.answer(asked);
    if (!block.leader()) continue;
    lamb_plan(block, batch, now, keeps, ready, claimed);
    work.sums[now.ticket] = norms;
    const int chunks = lamb_end(batch, now.tensor) - tensor.first_chunk;
    if (block.arrive(work.arrived + now.tensor) == chunks - 1) block.next().finished = now.tensor;
  }
}

// The last phase alone, from totals that others have completed.
template <class Block>
FASTBERT_HOST_DEVICE void lamb_apply(Block& block, const LambBatch& batch) {
  const float inv_scale = lamb_inv_scale(batch);
  if (std::isnan(inv_scale)) return;
  for (;;) {
    if (block.leader()) {
      LambPlan& plan = block.next();
      plan.ticket = block.claim(batch.work.tickets + 2);
      plan.tensor = plan.ticket < batch.chunks ? lamb_tensor_of(batch, plan.ticket) : -1;
      if (plan.tensor >= 0) plan.scales[0] = lamb_scale(block, batch, plan.tensor);
    }
    const LambPlan& now = block.flip();
    if (now.ticket >= batch.chunks) return;
    const LambTensor& tensor = batch.tensors[now.tensor];
    const LambScalars s = lamb_scalars(batch.groups[tensor.group], batch.work.bias + 2 * now.tensor, inv_scale);
    block.apply(s, tensor, lamb_part<Block::kChunk>(batch, now.ticket, now.tensor), now.scales[0]);
  }
}

template <class Block>
FASTBERT_HOST_DEVICE void lamb_run(Block& block, const LambBatch& batch, int phases) {
  if (phases & kNorm) lamb_norm(block, batch);
  if (phases & kMoments) lamb_step(block, batch, phases);
  else if (phases & kApply) lamb_apply(block, batch);
}

}  // namespace fastbert
