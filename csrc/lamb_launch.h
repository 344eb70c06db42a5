// What bindings.cpp calls: launchers of the LAMB step on each device.
#pragma once

#include <functional>
#include <memory>
#include <type_traits>

#include "lamb.h"

namespace fastbert {

// Runs body(begin, end) over parts of [0, count), possibly in parallel; returns when all are done.
using Range = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, const Range& body)>;

// Phases of a batch, by at most `threads` threads.
void lamb_cpu(LambBatch& batch, int phases, int threads, const ParallelFor& parallel_for);

// Launches on `stream` (a cudaStream_t) of the current device and returns at once: nullptr, or what CUDA says is wrong.
const char* lamb_cuda(LambBatch& batch, int phases, void* stream);

// Sets bytes on the device to zero, on `stream`; returns as above.
const char* clear_cuda(void* memory, size_t bytes, void* stream);

}  // namespace fastbert
