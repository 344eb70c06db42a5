// All layers of a post-LN encoder (BERT, ALBERT) in one launch, for inference with few rows, where time goes into the
// latency of what follows one another rather than into work.
//
// The work of an application is cut into items, in the order in which they depend on one another:
//   qkv      q, k, v = x Wqkv^T + bqkv                           a tile of rows and columns
//   attend   o = softmax(q k^T / 8) v                            32 queries of a head
//   out      parts of o Wo^T                                     a tile, over a part of K
//   norm1    y = LN(x + bo + sum of the parts)                   1 to 4 rows
//   up       h = act(y Wup^T + bup)                              a tile
//   down     parts of h Wdown^T                                  a tile, over a part of K
//   norm2    x = LN(y + bdown + sum of the parts)                1 to 4 rows
// Blocks, one per multiprocessor, claim items in this order by tickets. An item waits for counters in global memory
// that tell how many items of the step before are done in its rows; it is not a barrier of the grid, so rows that are
// ahead stay ahead. No deadlock, with any number of blocks, resident or not: a block works off what it has claimed in
// order, and an item waits for items of smaller tickets only. Of all items that are not done, the one with the smallest
// ticket is thus next in a block that runs, and nothing that it waits for is missing. No cooperative launch.
//
// Weights depend on nothing. A block knows its next item when it begins one, and asks for the weights of both before
// it waits for the rows of the first: the ring of slots in shared memory goes on from item to item, and the weights of
// an item are there when its rows come. Inside a block, four pairs of warps share out K, so that a warp reads 2.5 KB of
// shared memory for 12 products of a tile of 64 by 48, not 1.25 KB for 3; their sums meet in two exchanges.
//
// Why LN is an item of its own and not done where its sums are read: unnormalised rows are float32, twice the bytes
// of the largest traffic there is (each of 64 up tiles reads all of its rows), and K could not be split, which would
// leave 32 tiles to 132 multiprocessors, each with all of K = 3072. An item more costs a hop.
//
// ALBERT-base (hidden 768, intermediate 3072) on an H100, per application, reckoned and not measured. A hop, from a
// store over release, poll and acquire to what the first load brings, takes some 1.4 us: seven are 10 us.
//   128 rows, tiles of 64 by 48: 96, 48, 128, 64, 128, 128, 64 items for 132 multiprocessors. After a hop a tile with
//   K = 768 takes 2500 cycles or 1.5 us, bound by shared memory (240 KB of fragments and 72 KB of sums, 128 bytes a
//   cycle) and not by mma.sync (1900); attend and out 0.5 us each, LN 0.3 us. 28 MB of weights from L2 come during
//   hops; 44 MB of rows and sums, 8 us at 5.5 TB/s, do not quite fit beside the products. In all 18 us for 1.8 GFLOP.
//   32 rows, tiles of 32 by 24: 0.7 us for a tile with K = 768, 4 us for all, 14 + 19 MB from L2. In all 14 us.
//
// The same bits in each run and on each device: tiles and parts of K follow from the shape alone, and sums are made in
// one order. Buffers are written again in the next application only by items that wait, directly or not, for all that
// read them; q, k, v have two buffers by turns, because rows may be a step ahead of others of their sequence.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "encoder_launch.h"
#include "encoder_plan.h"
#include "memory_order.h"
#include "mma.h"

namespace fastbert {
namespace {

// ---------------------------------------------------------------- numbers

template <bool kHalf>
__device__ float2 unpack(uint32_t word) {
  if (kHalf) return __half22float2(reinterpret_cast<const __half2&>(word));
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
}

template <bool kHalf>
__device__ uint32_t pack(float low, float high) {
  if (kHalf) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ float activate(float x, EncoderActivation activation) {
  if (activation == kRelu) return x < 0.0f ? 0.0f : x;  // NaN stays
  const float y = activation == kGelu ? erff(x * 0.70710678f) : tanhf(0.79788456f * (x + 0.044715f * x * x * x));
  return 0.5f * x * (1.0f + y);
}

__device__ float sum_of_warp(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Rows of 16-bit numbers in shared memory: which 16 bytes of a row lie where. The same 16 bytes of 8 rows that follow
// one another are in different banks.
__device__ int place(int row, int sixteenth, int row_bytes) { return row * row_bytes + ((sixteenth ^ (row & 7)) << 4); }

// ---------------------------------------------------------------- a block

template <int kRowFragments_, int kColumnFragments_>
struct Tile {
  static constexpr int kRowFragments = kRowFragments_;        // 16 rows each, of a warp
  static constexpr int kColumnFragments = kColumnFragments_;  // 8 columns each, of all warps
  static constexpr int kRows = 32 * kRowFragments;
  static constexpr int kColumns = 8 * kColumnFragments;
  static constexpr int kDepth = kRowFragments == 1 ? 256 : 128;  // K of a slot
  static constexpr int kRowBytes = 2 * kDepth;
  static constexpr int kSourceBytes = kRows * kRowBytes;
  static constexpr int kSlotBytes = kSourceBytes + kColumns * kRowBytes;
  // Fragments of a warp that are traded: each of four groups ends with a quarter of them.
  static constexpr int kFragments = (kRowFragments * kColumnFragments + 3) / 4 * 4;
  static constexpr int kTraded = kFragments > 8 ? kFragments / 2 : 4;  // attention has 8
  static constexpr int kTradeBytes = kTraded * kThreads * static_cast<int>(sizeof(float4));
  static_assert(kSlotBytes >= (kQueries + 2 * kKeys) * 2 * kHeadColumns, "queries, keys and values fit into a slot");
};

// A thread's copies of rows into slots: 16 bytes of a row, and of each `step` rows further.
struct Stream {
  const uint16_t* from;  // of the next stage
  int64_t step;          // elements
  int rows;              // that there are from its first on
  int left;              // K from there on
};

// What the warps of attention know of a row: the greatest score and the sum.
struct RowStatistics {
  float greatest, sum;
};

template <bool kHalf, class Tile>
class Worker {
 public:
  __device__ Worker(const Plan& plan, char* shared)
      : plan_(plan), trade_(reinterpret_cast<float4*>(shared)), ring_(shared_address(shared + Tile::kTradeBytes)) {
    copy_place_ = place(copied_row(), copied_sixteenth(), Tile::kRowBytes);
    #pragma unroll
    for (int j = 0; j < 2; ++j)
      row_places_[j] = place(half() * 16 * Tile::kRowFragments + lane() % 16, group() * 4 + 2 * j + lane() / 16,
                             Tile::kRowBytes);
    column_place_ = Tile::kSourceBytes + place(lane() % 8, group() * 4 + lane() / 8, Tile::kRowBytes);
    for (int* each : {&copy_place_, row_places_, row_places_ + 1, &column_place_}) keep(*each);
  }

  __device__ void run() {
    static __shared__ Item items[3];  // this one, the next, and the one after that
    Claim claim = {};
    if (threadIdx.x == kClaimer) {
      claim.ticket = atomicAdd(plan_.tickets, 1);
      const int second = atomicAdd(plan_.tickets, 1), third = atomicAdd(plan_.tickets, 1);  // under way together
      #pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        decode<Tile>(plan_, claim, items[i]);
        claim.ticket = i == 0 ? second : third;
      }
    }
    __syncthreads();
    for (int turn = 0; items[turn % 3].phase != kNothing; ++turn) {
      const Item item = items[turn % 3], next = items[(turn + 1) % 3];  // in registers
      load_weights(item, next, plan_.slots);
      // Here there is time, as a rule: what this block has just done comes to be known to itself too only in a while.
      if (threadIdx.x == kClaimer) {
        decode<Tile>(plan_, claim, items[(turn + 2) % 3]);
        claim.ticket = atomicAdd(plan_.tickets, 1);
      }
      if (item.phase == kNorm1 || item.phase == kNorm2) {
        normalise(item);
      } else {
        if (item.phase == kAttend) find_keys(item);
        source_ = stream_of(item.source, item.row, plan_.shape.rows, item.depth, item.begin, item.end);
        wait(item);
        #pragma unroll 1
        for (int stage = 0; stage < plan_.slots - 1; ++stage) {
          if (stage < item.stages) load_source(item, stage);
          commit_copies();
        }
        if (item.phase == kAttend) attend(item, next);
        else multiply(item, next);
      }
      __syncthreads();
      if (threadIdx.x == 0) add_release(item.done);
      ahead_ -= item.stages;
    }
  }

 private:
  __device__ int warp() const { return threadIdx.x / 32; }
  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int half() const { return warp() % 2; }   // of the rows
  __device__ int group() const { return warp() / 2; }  // of K

  // The slot that is next for what `turn` counts: all of them go round the ring, stage by stage and item by item.
  __device__ SharedAddress take_slot(int& turn) {
    const SharedAddress at = ring_ + turn * Tile::kSlotBytes;
    turn = turn + 1 == plan_.slots ? 0 : turn + 1;
    return at;
  }

  __device__ void wait(const Item& item) {
    for (int i = threadIdx.x; i < item.wait_count; i += kThreads)  // one, as a rule
      while (load_acquire(item.waits + i * kCounterStride) < item.enough) __nanosleep(20);
    __syncthreads();
  }

  // ---- loads

  static constexpr int kSixteenths = Tile::kDepth / 8;          // of a row
  static constexpr int kRowStep = kThreads / kSixteenths;       // a multiple of 8: the place in a row is the same
  __device__ int copied_row() const { return threadIdx.x / kSixteenths; }
  __device__ int copied_sixteenth() const { return threadIdx.x % kSixteenths; }

  __device__ Stream stream_of(const uint16_t* matrix, int row, int rows, int depth, int begin, int end) const {
    const int k = begin + copied_sixteenth() * 8;
    row += copied_row();
    const int64_t pitch = depth;
    return {matrix + row * pitch + k, kRowStep * pitch, rows - row, end - k};
  }

  template <int kRows>
  __device__ void load(Stream& stream, SharedAddress to) {
    to += copy_place_;
    if (stream.left > 0) {
      #pragma unroll
      for (int i = 0; i < kRows; i += kRowStep)
        if (i + kRowStep <= kRows || i + copied_row() < kRows)
          copy_async(to + i * Tile::kRowBytes, stream.from + i / kRowStep * stream.step, i < stream.rows);
    }
    stream.from += Tile::kDepth;
    stream.left -= Tile::kDepth;
  }

  // Weights of this item and the next, up to stage `end` of this.
  __device__ void load_weights(const Item& item, const Item& next, int end) {
    end = min(end, item.stages + next.stages);
    #pragma unroll 1
    for (; ahead_ < end; ++ahead_) {
      const bool later = ahead_ == item.stages;
      if (later || ahead_ == 0) {
        const auto of = [&](auto Item::*field) { return later ? next.*field : item.*field; };  // values: in registers
        weights_ = stream_of(of(&Item::weight), of(&Item::column), of(&Item::columns), of(&Item::depth),
                             of(&Item::begin), of(&Item::end));
      }
      load<Tile::kColumns>(weights_, take_slot(weights_slot_) + Tile::kSourceBytes);
    }
  }

  __device__ void load_source(const Item& item, int stage) {
    const SharedAddress to = take_slot(source_slot_);
    if (item.phase == kAttend) load_heads(item, stage, to);
    else load<Tile::kRows>(source_, to);
  }

  // Keys and values of a stage, with its first also the queries. What is masked is not read: NaN times 0 is NaN.
  __device__ void load_heads(const Item& item, int stage, SharedAddress to) {
    const int64_t pitch = 3 * static_cast<int64_t>(plan_.encoder.hidden);
    const int sixteenth = threadIdx.x % 8;
    const uint16_t* const from = item.source + item.column + sixteenth * 8;
    if (stage == 0) {
      const int row = threadIdx.x / 8;
      const bool real = item.row + row < plan_.encoder.length;
      copy_async(to + place(row, sixteenth, kHeadBytes), real ? from + (item.row + row) * pitch : item.source, real);
    }
    #pragma unroll
    for (int i = 0; i < kKeys; i += kThreads / 8) {
      const int row = i + threadIdx.x / 8, key = stage * kKeys + row;
      const bool real = is_key(key);
      const uint16_t* k = real ? from + key * pitch + plan_.encoder.hidden : item.source;
      const uint16_t* v = real ? from + key * pitch + 2 * plan_.encoder.hidden : item.source;
      copy_async(to + kKeysAt + place(row, sixteenth, kHeadBytes), k, real);
      copy_async(to + kValuesAt + place(row, sixteenth, kHeadBytes), v, real);
    }
  }

  // Begins a stage: what it reads is there, in the slot returned.
  __device__ SharedAddress begin_stage() {
    // A group of copies for each stage: this one's is followed by those of slots - 2 more.
    if (plan_.slots >= 7) wait_copies<5>();
    else if (plan_.slots == 6) wait_copies<4>();
    else if (plan_.slots == 5) wait_copies<3>();
    else if (plan_.slots == 4) wait_copies<2>();
    else if (plan_.slots == 3) wait_copies<1>();
    else wait_copies<0>();
    __syncthreads();
    return take_slot(stage_slot_);
  }

  // Asks for what may follow into the slot of the stage before this.
  __device__ void ask_further(const Item& item, const Item& next, int stage) {
    load_weights(item, next, stage + plan_.slots);
    const int later = stage + plan_.slots - 1;
    if (later < item.stages) load_source(item, later);
    commit_copies();
  }

  // ---- sums over the groups

  // Each group has sums of all fragments over its part of K, and afterwards a quarter of the fragments over all of K:
  // acc[i] is then fragment first + i. Returns first.
  template <int kFragments>
  __device__ int trade(float (&acc)[kFragments][4]) {
    constexpr int kTwo = kFragments / 2, kOne = kFragments / 4;
    static_assert(kFragments % 4 == 0 && kTwo <= Tile::kTraded, "what there is room for");
    const bool high = group() / 2, odd = group() % 2;
    trade_half<kTwo>(acc, high, 4);
    __syncthreads();
    trade_half<kOne>(acc, odd, 2);
    return high * kTwo + odd * kOne;
  }

  // Keeps the lower or the upper half of 2 kCount fragments, gives the other to the warp whose number differs in `bit`.
  template <int kCount, int kFragments>
  __device__ void trade_half(float (&acc)[kFragments][4], bool upper, int bit) {
    #pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float(&low)[4] = acc[i], (&high)[4] = acc[kCount + i];
      trade_[(i * kWarps + warp()) * 32 + lane()] = make_float4(
          upper ? low[0] : high[0], upper ? low[1] : high[1], upper ? low[2] : high[2], upper ? low[3] : high[3]);
    }
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4 other = trade_[(i * kWarps + (warp() ^ bit)) * 32 + lane()];
      acc[i][0] = (upper ? acc[kCount + i][0] : acc[i][0]) + other.x;
      acc[i][1] = (upper ? acc[kCount + i][1] : acc[i][1]) + other.y;
      acc[i][2] = (upper ? acc[kCount + i][2] : acc[i][2]) + other.z;
      acc[i][3] = (upper ? acc[kCount + i][3] : acc[i][3]) + other.w;
    }
  }

  // ---- a tile of a product

  __device__ void multiply(const Item& item, const Item& next) {
    constexpr int kRowFragments = Tile::kRowFragments, kColumnFragments = Tile::kColumnFragments;
    constexpr int kFragments = Tile::kFragments, kMine = kFragments / 4;
    const bool whole = item.phase == kQkv || item.phase == kUp;  // not a part of K: with bias, to 16 bits
    // Where the fragments lie that this warp ends with.
    const int first = group() / 2 * (kFragments / 2) + group() % 2 * kMine;
    const auto row_of = [&](int i) {
      return item.row + (half() * kRowFragments + (first + i) / kColumnFragments) * 16 + lane() / 4;
    };
    const auto column_of = [&](int i) {
      const int column = item.column + (first + i) % kColumnFragments * 8 + lane() % 4 * 2;
      return first + i < kRowFragments * kColumnFragments ? column : item.columns;
    };
    float2 bias[kMine];  // asked for now, while the rows come
    #pragma unroll
    for (int i = 0; i < kMine; ++i) {
      bias[i] = {0.0f, 0.0f};
      const int column = column_of(i);
      if (whole && column < item.columns) bias[i] = *reinterpret_cast<const float2*>(item.bias + column);
    }

    float acc[kFragments][4];
    #pragma unroll
    for (int i = 0; i < kFragments; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;
    // K that is left to this warp: none where all of its rows are beyond the last.
    const bool idle = item.row + half() * kRowFragments * 16 >= plan_.shape.rows;
    const int left = idle ? 0 : item.end - item.begin - group() * 32;
    const bool few = plan_.slots < 4;
    #pragma unroll 1
    for (int stage = 0; stage < item.stages; ++stage) {
      const SharedAddress at = begin_stage();
      // With few slots the copies must not wait for the products, otherwise not the products for them.
      if (few) ask_further(item, next, stage);
      #pragma unroll
      for (int k = 0; k < Tile::kDepth; k += 32 * kGroups) {
        if (k >= left - stage * Tile::kDepth) continue;
        uint32_t a[kRowFragments][2][4];
        #pragma unroll
        for (int i = 0; i < kRowFragments; ++i)
          #pragma unroll
          for (int j = 0; j < 2; ++j) load_matrices(a[i][j], at + row_places_[j] + i * 16 * Tile::kRowBytes + 2 * k);
        #pragma unroll
        for (int n = 0; n < kColumnFragments; ++n) {
          uint32_t b[4];
          load_matrices(b, at + column_place_ + n * 8 * Tile::kRowBytes + 2 * k);
          #pragma unroll
          for (int i = 0; i < kRowFragments; ++i) {
            multiply_add<kHalf>(acc[i * kColumnFragments + n], a[i][0], b[0], b[1]);
            multiply_add<kHalf>(acc[i * kColumnFragments + n], a[i][1], b[2], b[3]);
          }
        }
      }
      if (!few) ask_further(item, next, stage);
    }
    trade(acc);

    #pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int column = column_of(i);
      if (column >= item.columns) continue;
      #pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = row_of(i) + 8 * j;
        if (row >= plan_.shape.rows) continue;
        float x = acc[i][2 * j], y = acc[i][2 * j + 1];
        const int64_t to = static_cast<int64_t>(row) * item.columns + column;
        if (!whole) {
          *reinterpret_cast<float2*>(static_cast<float*>(item.target) + to) = {x, y};
          continue;
        }
        x += bias[i].x;
        y += bias[i].y;
        if (item.phase == kUp) {
          x = activate(x, plan_.encoder.activation);
          y = activate(y, plan_.encoder.activation);
        }
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(item.target) + to) = pack<kHalf>(x, y);
      }
    }
  }

  // ---- attention

  static constexpr int kHeadBytes = 2 * kHeadColumns;
  static constexpr int kKeysAt = kQueries * kHeadBytes;
  static constexpr int kValuesAt = kKeysAt + kKeys * kHeadBytes;

  __device__ static unsigned* keys() {  // a bit for each key of the sequence: whether it is real
    static __shared__ unsigned bits[kMaxLength / 32];
    return bits;
  }
  __device__ static bool is_key(int key) { return keys()[key / 32] >> key % 32 & 1; }

  __device__ void find_keys(const Item& item) {
    const uint8_t* const mask = plan_.encoder.mask;
    const int length = plan_.encoder.length;
    for (int word = warp(); word < kMaxLength / 32; word += kWarps) {
      const int key = word * 32 + lane();
      bool real = key < length;
      if (real && mask != nullptr) real = __ldg(mask + static_cast<int64_t>(item.sequence) * length + key) != 0;
      const unsigned bits = __ballot_sync(~0u, real);
      if (lane() == 0) keys()[word] = bits;
    }
  }

  // Each group has 16 keys of each stage, each warp of it 16 queries, with a softmax of its own until the end.
  __device__ void attend(const Item& item, const Item& next) {
    constexpr float kScale = 0.125f * 1.44269504f;  // 1 / sqrt(64), and to base 2
    uint32_t q[4][4];
    float acc[8][4];
    float greatest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};  // of rows lane / 4 and 8 further
    #pragma unroll
    for (int i = 0; i < 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;
    #pragma unroll 1
    for (int stage = 0; stage < item.stages; ++stage) {
      const SharedAddress at = begin_stage();
      ask_further(item, next, stage);
      if (stage == 0) {
        #pragma unroll
        for (int i = 0; i < 4; ++i)
          load_matrices(q[i], at + place(half() * 16 + lane() % 16, 2 * i + lane() / 16, kHeadBytes));
      }
      const int key = stage * kKeys + group() * 16;
      const unsigned real = keys()[key / 32] >> key % 32 & 0xffff;
      if (real == 0) continue;  // all lanes agree
      float scores[2][4] = {};
      #pragma unroll
      for (int n = 0; n < 2; ++n)
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t b[4];
          load_matrices(b, at + kKeysAt + place(group() * 16 + n * 8 + lane() % 8, 4 * i + lane() / 8, kHeadBytes));
          multiply_add<kHalf>(scores[n], q[2 * i], b[0], b[1]);
          multiply_add<kHalf>(scores[n], q[2 * i + 1], b[2], b[3]);
        }
      #pragma unroll
      for (int j = 0; j < 2; ++j) {
        float most = greatest[j];
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[i / 2][2 * j + i % 2];
          const bool is_real = real >> (i / 2 * 8 + lane() % 4 * 2 + i % 2) & 1;
          score = is_real ? score * kScale : -INFINITY;
          most = fmaxf(most, score);
        }
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const float shrink = exp2f(greatest[j] - most);  // `most` is a real key's
        greatest[j] = most;
        sum[j] *= shrink;
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[i / 2][2 * j + i % 2];
          score = exp2f(score - most);
          sum[j] += score;
        }
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
          acc[i][2 * j] *= shrink;
          acc[i][2 * j + 1] *= shrink;
        }
      }
      const uint32_t p[4] = {pack<kHalf>(scores[0][0], scores[0][1]), pack<kHalf>(scores[0][2], scores[0][3]),
                             pack<kHalf>(scores[1][0], scores[1][1]), pack<kHalf>(scores[1][2], scores[1][3])};
      #pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t b[4];
        load_transposed(b, at + kValuesAt + place(group() * 16 + lane() % 16, 2 * i + lane() / 16, kHeadBytes));
        multiply_add<kHalf>(acc[2 * i], p, b[0], b[1]);
        multiply_add<kHalf>(acc[2 * i + 1], p, b[2], b[3]);
      }
    }

    // The groups agree on the greatest score and the sum of each row.
    static __shared__ RowStatistics statistics[kWarps][16];
    #pragma unroll
    for (int j = 0; j < 2; ++j) {
      sum[j] += __shfl_xor_sync(~0u, sum[j], 1);
      sum[j] += __shfl_xor_sync(~0u, sum[j], 2);
      if (lane() % 4 == 0) statistics[warp()][lane() / 4 + 8 * j] = {greatest[j], sum[j]};
    }
    __syncthreads();
    #pragma unroll
    for (int j = 0; j < 2; ++j) {
      RowStatistics parts[kGroups];
      float most = -INFINITY, total = 0.0f;
      #pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        parts[i] = statistics[i * 2 + half()][lane() / 4 + 8 * j];
        most = fmaxf(most, parts[i].greatest);
      }
      #pragma unroll
      for (int i = 0; i < kGroups; ++i)
        if (parts[i].sum > 0.0f) total += parts[i].sum * exp2f(parts[i].greatest - most);
      const float scale = sum[j] > 0.0f ? exp2f(greatest[j] - most) / total : 0.0f;
      #pragma unroll
      for (int i = 0; i < 8; ++i) {
        acc[i][2 * j] *= scale;
        acc[i][2 * j + 1] *= scale;
      }
    }
    const int first = trade(acc);
    const int hidden = plan_.encoder.hidden;
    auto* const target = static_cast<uint16_t*>(item.target) + item.column;
    #pragma unroll
    for (int i = 0; i < 2; ++i)
      #pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = item.row + half() * 16 + lane() / 4 + 8 * j;
        if (row >= plan_.encoder.length) continue;
        const int64_t to = (static_cast<int64_t>(item.sequence) * plan_.encoder.length + row) * hidden;
        *reinterpret_cast<uint32_t*>(target + to + (first + i) * 8 + lane() % 4 * 2) =
            pack<kHalf>(acc[i][2 * j], acc[i][2 * j + 1]);
      }
  }

  // ---- LN

  __device__ void normalise(const Item& item) {
    constexpr int kRuns = kMaxHidden / kWarps / 128;  // of 128 columns, 4 for each lane
    const bool second = item.phase == kNorm2;
    const EncoderLayer& layer = plan_.encoder.layers[item.layer];
    const float* const bias = second ? layer.down_bias : layer.out_bias;
    const float* const scale = second ? layer.norm2_weight : layer.norm1_weight;
    const float* const shift = second ? layer.norm2_bias : layer.norm1_bias;
    const int hidden = plan_.encoder.hidden, parts = plan_.shape.parts[second];
    const int warps = kWarps >> plan_.shape.norm_shift;  // for each row
    const int first_warp = warp() & ~(warps - 1), share = warp() - first_warp;
    const int row = item.row + (warp() << plan_.shape.norm_shift) / kWarps;
    const bool is_row = row < plan_.shape.rows;
    const auto column_of = [&](int i) { return ((i * warps + share) * 32 + lane()) * 4; };
    float4 added[kRuns], scales[kRuns], shifts[kRuns];
    #pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int column = column_of(i);
      added[i] = scales[i] = shifts[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (column >= hidden) continue;
      added[i] = __ldg(reinterpret_cast<const float4*>(bias + column));
      scales[i] = __ldg(reinterpret_cast<const float4*>(scale + column));
      shifts[i] = __ldg(reinterpret_cast<const float4*>(shift + column));
    }
    wait(item);  // for all but the parameters

    const int64_t start = static_cast<int64_t>(row) * hidden;
    const int64_t pitch = static_cast<int64_t>(plan_.shape.rows) * hidden;
    float values[kRuns][4];
    float total = 0.0f;
    int count = 0;  // of this warp's columns
    #pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int column = column_of(i);
      values[i][0] = values[i][1] = values[i][2] = values[i][3] = 0.0f;
      count += max(0, min(128, hidden - (i * warps + share) * 128));
      if (column >= hidden || !is_row) continue;
      const uint2 words = __ldcg(reinterpret_cast<const uint2*>(item.source + start + column));
      float4 some[kMaxParts];
      #pragma unroll
      for (int part = 0; part < kMaxParts; ++part)
        if (part < parts)
          some[part] = __ldcg(reinterpret_cast<const float4*>(plan_.sums + part * pitch + start + column));
      float4 sum = some[0];
      #pragma unroll
      for (int part = 1; part < kMaxParts; ++part)
        if (part < parts) {
          sum.x += some[part].x;
          sum.y += some[part].y;
          sum.z += some[part].z;
          sum.w += some[part].w;
        }
      const float2 low = unpack<kHalf>(words.x), high = unpack<kHalf>(words.y);
      values[i][0] = low.x + (sum.x + added[i].x);
      values[i][1] = low.y + (sum.y + added[i].y);
      values[i][2] = high.x + (sum.z + added[i].z);
      values[i][3] = high.y + (sum.w + added[i].w);
      total += (values[i][0] + values[i][1]) + (values[i][2] + values[i][3]);
    }
    // Means and squares around them of each warp, then of the row.
    const float own = sum_of_warp(total) / max(count, 1);
    float squares = 0.0f;
    #pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      if (column_of(i) >= hidden) continue;
      #pragma unroll
      for (int j = 0; j < 4; ++j) squares += (values[i][j] - own) * (values[i][j] - own);
    }
    squares = sum_of_warp(squares);
    static __shared__ float4 shares[kWarps];
    if (lane() == 0) shares[warp()] = make_float4(own, squares, static_cast<float>(count), 0.0f);
    __syncthreads();
    const float4* const of_row = shares + first_warp;
    float mean = 0.0f, variance = 0.0f;
    for (int i = 0; i < warps; ++i) mean += of_row[i].z * of_row[i].x;
    mean /= hidden;
    for (int i = 0; i < warps; ++i) {
      const float far = of_row[i].x - mean;
      variance += of_row[i].y + of_row[i].z * far * far;
    }
    variance /= hidden;
    const float inverse = 1.0f / sqrtf(variance + plan_.encoder.eps);
    #pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int column = column_of(i);
      if (column >= hidden || !is_row) continue;
      const float x = (values[i][0] - mean) * inverse * scales[i].x + shifts[i].x;
      const float y = (values[i][1] - mean) * inverse * scales[i].y + shifts[i].y;
      const float z = (values[i][2] - mean) * inverse * scales[i].z + shifts[i].z;
      const float w = (values[i][3] - mean) * inverse * scales[i].w + shifts[i].w;
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(item.target) + start + column) =
          make_uint2(pack<kHalf>(x, y), pack<kHalf>(z, w));
    }
  }

  const Plan& plan_;
  float4* trade_;  // [fragments][threads]
  SharedAddress ring_;  // [slots]: rows and weights, or queries, keys and values
  // Where this thread's copies and fragments lie in a slot.
  int copy_place_, row_places_[2], column_place_;
  int ahead_ = 0;  // stages, from this item's first, whose weights have been asked for
  int weights_slot_ = 0, source_slot_ = 0, stage_slot_ = 0;
  Stream weights_, source_;
};

template <bool kHalf, class Tile>
__global__ void __launch_bounds__(kThreads, 1) encoder_kernel(const __grid_constant__ Plan plan) {
  extern __shared__ uint4 encoder_memory[];
  Worker<kHalf, Tile> worker(plan, reinterpret_cast<char*>(encoder_memory));
  worker.run();
}

// ---------------------------------------------------------------- the launcher

const char* message(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next launch of anybody would report it again
  return cudaGetErrorString(status);
}

template <bool kHalf, class Tile>
const char* launch(Plan& plan, void* stream) {
  int device = 0, multiprocessors = 0, shared = 0;
  size_t cleared = 0;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaGetDevice(&device);
  const auto ask = [&](int& value, cudaDeviceAttr what) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, what, device);
  };
  ask(multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const auto kernel = encoder_kernel<kHalf, Tile>;
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return message(status);
  const int room = shared - static_cast<int>(attributes.sharedSizeBytes) - Tile::kTradeBytes;
  plan.slots = std::min(kMaxSlots, room / Tile::kSlotBytes);
  if (plan.slots < 2) return "the encoder in one launch needs a device with 96 KB of shared memory per block";
  const int bytes = Tile::kTradeBytes + plan.slots * Tile::kSlotBytes;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return message(status);
  cut(plan, &cleared);
  status = cudaMemsetAsync(plan.encoder.workspace, 0, cleared, static_cast<cudaStream_t>(stream));
  if (status != cudaSuccess) return message(status);
  void* arguments[] = {&plan};
  status = cudaLaunchKernel(kernel, multiprocessors, kThreads, arguments, bytes, static_cast<cudaStream_t>(stream));
  return message(status);
}

template <bool kHalf>
const char* launch(Plan& plan, void* stream) {
  const bool wide = plan.shape.column_fragments % 4 == 0;
  if (plan.shape.row_fragments == 1)
    return wide ? launch<kHalf, Tile<1, 4>>(plan, stream) : launch<kHalf, Tile<1, 3>>(plan, stream);
  if (plan.shape.column_fragments <= 4)
    return wide ? launch<kHalf, Tile<2, 4>>(plan, stream) : launch<kHalf, Tile<2, 3>>(plan, stream);
  return wide ? launch<kHalf, Tile<2, 8>>(plan, stream) : launch<kHalf, Tile<2, 6>>(plan, stream);
}

// The first thing that is wrong with a call, or null.
const char* complaint(const Encoder& e) {
  if (!is_supported(e.batch, e.length, e.hidden, e.intermediate)) return "the encoder in one launch has other shapes";
  if (e.applications < 1 || e.applications > kEncoderApplications) return "too many applications of layers, or none";
  const auto is_bad = [](const void* address) {
    return address == nullptr || reinterpret_cast<uintptr_t>(address) % 16 != 0;
  };
  bool bad = is_bad(e.input) || is_bad(e.output) || reinterpret_cast<uintptr_t>(e.workspace) % 256 != 0;
  for (int i = 0; i < e.applications; ++i) {
    if (e.layer_of[i] >= kEncoderLayers) return "there is no such layer";
    const EncoderLayer& layer = e.layers[e.layer_of[i]];
    for (const void* each : {layer.qkv_weight, layer.out_weight, layer.up_weight, layer.down_weight})
      bad = bad || is_bad(each);
    for (const float* each : {layer.qkv_bias, layer.out_bias, layer.norm1_weight, layer.norm1_bias, layer.up_bias,
                              layer.down_bias, layer.norm2_weight, layer.norm2_bias})
      bad = bad || is_bad(each);
  }
  return bad || e.workspace == nullptr ? "a pointer is null or not aligned" : nullptr;
}

}  // namespace

size_t encoder_workspace(int batch, int length, int hidden, int intermediate) {
  if (!is_supported(batch, length, hidden, intermediate)) return 0;
  Plan plan = {};
  size_t cleared = 0;
  plan.encoder.hidden = hidden;
  plan.encoder.intermediate = intermediate;
  plan.shape = shape_of(batch, length, hidden, intermediate);
  return cut(plan, &cleared);
}

const char* encoder_cuda(const Encoder& encoder, void* stream) {
  const char* const wrong = complaint(encoder);
  if (wrong != nullptr) return wrong;
  Plan plan;
  plan.encoder = encoder;
  plan.shape = shape_of(encoder.batch, encoder.length, encoder.hidden, encoder.intermediate);
  return encoder.half ? launch<true>(plan, stream) : launch<false>(plan, stream);
}

}  // namespace fastbert
