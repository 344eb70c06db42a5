// The plan of encoder_layers.cu: into which items the work is cut, in which order, what each reads, writes and waits
// for, and where in the workspace it lies. The top of that file says why.
#pragma once

#include <algorithm>
#include <cstdint>

#include "encoder_launch.h"

namespace fastbert {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kGroups = 4;         // of two warps, each with its part of K
constexpr int kClaimer = 32 * 7;   // the thread that claims items; thread 0 has enough to do with waiting
constexpr int kQueries = 32;       // of an item of attention: 16 for each warp of a group
constexpr int kKeys = 64;          // of a slot: 16 for each group
constexpr int kHeadColumns = 64;
constexpr int kMaxHidden = 4096;
constexpr int kMaxIntermediate = 16384;
constexpr int kMaxLength = 512;
constexpr int kMaxBatch = 8;
constexpr int kMaxParts = 4;       // of K
constexpr int kLeastPart = 128;    // of K: less is not worth its sums
constexpr int kTilesAtOnce = 132;  // that tiles are chosen for: the multiprocessors of an H100, on any device
constexpr int kMaxSlots = 7;
constexpr int kCounterStride = 8;  // counters lie 32 bytes apart

enum Phase { kQkv, kAttend, kOut, kNorm1, kUp, kDown, kNorm2, kPhases, kNothing = kPhases };

// Divides what is less than 2^32 / by, in a few cycles.
struct Divisor {
  int by;
  uint32_t inverse;  // rounded up, times 2^32
};

// The sizes that follow from the shape alone.
struct Shape {
  int rows, heads;
  int row_fragments, column_fragments;  // of the tile
  int tile_rows, tile_columns;
  int row_blocks, query_blocks;
  int norm_shift;  // an item of LN has 1 << norm_shift rows, each shared out to 8, 4 or 2 warps
  int tiles[3];   // over the columns: of q, k, v; hidden; intermediate
  int parts[2];   // of K: out, down
  int depths[2];  // K of a part
  int items[kPhases], per_application;
  int counters[kPhases], all_counters;  // the first of each phase
  Divisor by_heads, by_query_blocks, by_length, by_tiles[3], by_parts[2];
};

struct Plan {
  Encoder encoder;
  Shape shape;
  int slots;
  int *tickets, *counters;
  uint16_t* qkv;      // [2, rows, 3 hidden]
  uint16_t* context;  // o: [rows, hidden]
  uint16_t* middle;   // y: [rows, hidden]
  uint16_t* inner;    // h: [rows, intermediate]
  float* sums;        // [parts, rows, hidden]
};
static_assert(sizeof(Plan) <= 32764, "the arguments of a kernel");

// ---------------------------------------------------------------- items

struct Item {
  Phase phase;
  int layer;
  int row, column;    // its first; of attention: the first query in its sequence, and the first column of the head
  int begin, end;     // of K
  int columns;        // that there are: of the weight, the rows
  int depth;          // K in all
  int stages;         // slots that it goes through
  int sequence;       // of attention
  const uint16_t *weight, *source;
  const float* bias;
  void* target;
  const int* waits;  // these counters must have come to `enough`
  int wait_count, enough;
  int* done;  // the counter to raise
};

__device__ inline int quotient(int number, Divisor divisor) {
  return divisor.by == 1 ? number : static_cast<int>(__umulhi(number, divisor.inverse));
}

// The quotient; the number becomes the remainder.
__device__ inline int divide(int& number, Divisor divisor) {
  const int result = quotient(number, divisor);
  number -= result * divisor.by;
  return result;
}

// What the thread that claims items knows: its next ticket, and the application it is of.
struct Claim {
  int ticket, application, first;  // first: the ticket that its application begins with
};

template <class Tile>
__device__ void decode(const Plan& plan, Claim& claim, Item& item) {
  const Encoder& e = plan.encoder;
  const Shape& s = plan.shape;
  while (claim.ticket - claim.first >= s.per_application) {
    claim.first += s.per_application;
    ++claim.application;
  }
  const int application = claim.application;
  if (application >= e.applications) {
    item.phase = kNothing;
    item.stages = 0;
    return;
  }
  int index = claim.ticket - claim.first, phase = 0;
  while (index >= s.items[phase]) index -= s.items[phase++];
  item.phase = static_cast<Phase>(phase);
  item.layer = e.layer_of[application];
  const EncoderLayer& layer = e.layers[item.layer];
  const auto counter = [&](int of, int i) { return plan.counters + (s.counters[of] + i) * kCounterStride; };
  uint16_t* const qkv = plan.qkv + static_cast<int64_t>(application % 2) * s.rows * 3 * e.hidden;
  const auto* x = static_cast<const uint16_t*>(application == 0 ? e.input : e.output);
  item.begin = 0;
  item.wait_count = 1;
  if (phase == kAttend) {
    const int block = divide(index, s.by_heads);
    int in_sequence = block;
    item.sequence = divide(in_sequence, s.by_query_blocks);
    item.row = in_sequence * kQueries;
    item.column = index * kHeadColumns;
    item.stages = (e.length + kKeys - 1) / kKeys;
    item.columns = item.depth = item.end = 0;  // of weights: there are none
    item.source = qkv + static_cast<int64_t>(item.sequence) * e.length * 3 * e.hidden;
    item.target = plan.context;
    const int first = item.sequence * e.length / Tile::kRows;
    const int last = ((item.sequence + 1) * e.length - 1) / Tile::kRows;
    item.waits = counter(kQkv, first);
    item.wait_count = last - first + 1;
    item.enough = (application + 1) * s.tiles[0];
    item.done = counter(kAttend, block);
    return;
  }
  if (phase == kNorm1 || phase == kNorm2) {
    const int which = phase == kNorm1 ? 0 : 1;
    item.row = index << s.norm_shift;
    item.stages = 0;
    item.source = which == 0 ? x : plan.middle;
    item.target = which == 0 ? plan.middle : static_cast<uint16_t*>(e.output);
    const int block = item.row / Tile::kRows;
    item.waits = counter(phase - 1, block);
    item.enough = (application + 1) * s.parts[which] * s.tiles[1];
    item.done = counter(phase, block);
    return;
  }
  int block = divide(index, s.by_tiles[phase == kQkv ? 0 : phase == kUp ? 2 : 1]);
  item.column = index * Tile::kColumns;
  int part = 0, depth = e.hidden;
  if (phase == kOut || phase == kDown) {
    const int which = phase == kOut ? 0 : 1;
    part = block;
    block = divide(part, s.by_parts[which]);
    depth = s.depths[which];
  }
  item.row = block * Tile::kRows;
  item.columns = phase == kQkv ? 3 * e.hidden : phase == kUp ? e.intermediate : e.hidden;
  item.depth = phase == kDown ? e.intermediate : e.hidden;
  item.begin = part * depth;
  item.end = min(item.begin + depth, item.depth);
  item.stages = (item.end - item.begin + Tile::kDepth - 1) / Tile::kDepth;
  item.done = counter(phase, block);
  const int last = min(item.row + Tile::kRows, s.rows) - 1;
  const int norms = (last >> s.norm_shift) - (item.row >> s.norm_shift) + 1;
  float* const sums = plan.sums + static_cast<int64_t>(part) * s.rows * e.hidden;
  if (phase == kQkv) {
    item.weight = static_cast<const uint16_t*>(layer.qkv_weight);
    item.bias = layer.qkv_bias;
    item.source = x;
    item.target = qkv;
    item.waits = counter(kNorm2, block);
    item.enough = application * norms;
  } else if (phase == kOut) {
    item.weight = static_cast<const uint16_t*>(layer.out_weight);
    item.source = plan.context;
    item.target = sums;
    const auto queries = [&](int row) {
      const int sequence = divide(row, s.by_length);
      return sequence * s.query_blocks + row / kQueries;
    };
    item.waits = counter(kAttend, queries(item.row));
    item.wait_count = queries(last) - queries(item.row) + 1;
    item.enough = (application + 1) * s.heads;
  } else if (phase == kUp) {
    item.weight = static_cast<const uint16_t*>(layer.up_weight);
    item.bias = layer.up_bias;
    item.source = plan.middle;
    item.target = plan.inner;
    item.waits = counter(kNorm1, block);
    item.enough = (application + 1) * norms;
  } else {
    item.weight = static_cast<const uint16_t*>(layer.down_weight);
    item.source = plan.inner;
    item.target = sums;
    item.waits = counter(kUp, block);
    item.enough = (application + 1) * s.tiles[2];
  }
}

// ---------------------------------------------------------------- on the host

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

inline bool is_supported(int batch, int length, int hidden, int intermediate) {
  return batch >= 1 && batch <= kMaxBatch && length >= 1 && length <= kMaxLength && hidden >= 64 &&
         hidden <= kMaxHidden && hidden % 64 == 0 && intermediate >= 64 && intermediate <= kMaxIntermediate &&
         intermediate % 64 == 0;
}

inline Shape shape_of(int batch, int length, int hidden, int intermediate) {
  Shape s;
  s.rows = batch * length;
  s.heads = hidden / kHeadColumns;
  s.row_fragments = s.rows <= 32 ? 1 : 2;
  s.tile_rows = 32 * s.row_fragments;
  s.row_blocks = divide_up(s.rows, s.tile_rows);
  // The width with which q, k, v and h are done soonest, if a tile costs as much as its columns and 16 more.
  int64_t least = 0;
  for (const int fragments : {3, 4}) {
    const int columns = 8 * fragments * (s.rows <= 64 ? 1 : 2);
    const int64_t rounds = divide_up(s.row_blocks * divide_up(3 * hidden, columns), kTilesAtOnce) +
                           divide_up(s.row_blocks * divide_up(intermediate, columns), kTilesAtOnce);
    const int64_t cost = rounds * (columns + 16);
    if (least != 0 && cost >= least) continue;
    least = cost;
    s.tile_columns = columns;
    s.column_fragments = columns / 8;
  }
  s.query_blocks = divide_up(length, kQueries);
  s.tiles[0] = divide_up(3 * hidden, s.tile_columns);
  s.tiles[1] = divide_up(hidden, s.tile_columns);
  s.tiles[2] = divide_up(intermediate, s.tile_columns);
  for (int i = 0; i < 2; ++i) {
    const int depth = i == 0 ? hidden : intermediate;
    const int wanted = std::min({kTilesAtOnce / (s.row_blocks * s.tiles[1]), depth / kLeastPart, kMaxParts});
    s.depths[i] = divide_up(divide_up(depth, std::max(1, wanted)), 64) * 64;
    s.parts[i] = divide_up(depth, s.depths[i]);
  }
  // Few rows at once while there are multiprocessors for them, and no more than its threads can hold.
  s.norm_shift = s.rows <= 64 || hidden > 2048 ? 0 : s.rows <= 128 || hidden > 1024 ? 1 : 2;
  const int norms = divide_up(s.rows, 1 << s.norm_shift);
  const int items[kPhases] = {s.row_blocks * s.tiles[0],
                              batch * s.query_blocks * s.heads,
                              s.row_blocks * s.tiles[1] * s.parts[0],
                              norms,
                              s.row_blocks * s.tiles[2],
                              s.row_blocks * s.tiles[1] * s.parts[1],
                              norms};
  s.per_application = s.all_counters = 0;
  for (int phase = 0; phase < kPhases; ++phase) {
    s.items[phase] = items[phase];
    s.per_application += items[phase];
    s.counters[phase] = s.all_counters;
    s.all_counters += phase == kAttend ? batch * s.query_blocks : s.row_blocks;
  }
  const auto divisor = [](int by) {
    return Divisor{by, static_cast<uint32_t>(((uint64_t{1} << 32) + by - 1) / by)};
  };
  s.by_heads = divisor(s.heads);
  s.by_query_blocks = divisor(s.query_blocks);
  s.by_length = divisor(length);
  for (int i = 0; i < 3; ++i) s.by_tiles[i] = divisor(s.tiles[i]);
  for (int i = 0; i < 2; ++i) s.by_parts[i] = divisor(s.parts[i]);
  return s;
}

// Cuts the workspace up, if there is one; returns how long it is. The counters come first, then the tickets.
inline size_t cut(Plan& plan, size_t* cleared) {
  const Shape& s = plan.shape;
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    char* const at = static_cast<char*>(plan.encoder.workspace) + used;
    used += (bytes + 255) / 256 * 256;
    return plan.encoder.workspace == nullptr ? nullptr : at;
  };
  const size_t rows = s.rows, hidden = plan.encoder.hidden, intermediate = plan.encoder.intermediate;
  plan.counters = reinterpret_cast<int*>(take(sizeof(int) * kCounterStride * s.all_counters));
  plan.tickets = reinterpret_cast<int*>(take(sizeof(int)));
  *cleared = used;
  plan.qkv = reinterpret_cast<uint16_t*>(take(2 * 2 * rows * 3 * hidden));
  plan.context = reinterpret_cast<uint16_t*>(take(2 * rows * hidden));
  plan.middle = reinterpret_cast<uint16_t*>(take(2 * rows * hidden));
  plan.inner = reinterpret_cast<uint16_t*>(take(2 * rows * intermediate));
  plan.sums = reinterpret_cast<float*>(take(sizeof(float) * std::max(s.parts[0], s.parts[1]) * rows * hidden));
  return used;
}

}  // namespace fastbert
