// What bindings.cpp calls: all layers of a post-LN encoder in one launch, for inference with few rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastbert {

constexpr int kEncoderLayers = 48;         // with weights of their own
constexpr int kEncoderApplications = 128;  // of layers, one after the other

enum EncoderActivation { kGelu, kGeluTanh, kRelu };

// Weights are 16-bit [out, in], the rest float32; all contiguous and aligned to 16 bytes.
struct EncoderLayer {
  const void* qkv_weight;  // [3 hidden, hidden]: queries, keys, values
  const float* qkv_bias;
  const void* out_weight;  // [hidden, hidden]
  const float *out_bias, *norm1_weight, *norm1_bias;
  const void* up_weight;  // [intermediate, hidden]
  const float* up_bias;
  const void* down_weight;  // [hidden, intermediate]
  const float *down_bias, *norm2_weight, *norm2_bias;
};

// Heads have 64 columns. hidden and intermediate are multiples of 64, at most 4096 and 16384; batch is at most 8 and
// length 512. Meant for some 256 rows: tiles are small.
struct Encoder {
  EncoderLayer layers[kEncoderLayers];
  uint8_t layer_of[kEncoderApplications];  // the layer of each application
  int applications;
  int batch, length, hidden, intermediate;
  float eps;
  EncoderActivation activation;
  bool half;  // else bfloat16
  const void* input;    // 16-bit [batch, length, hidden]
  void* output;         // the same; may be input
  const uint8_t* mask;  // [batch, length], 1 where there is a key; null: everywhere
  void* workspace;      // encoder_workspace() bytes, aligned to 256, of this launch alone
};

// Bytes that a launch of this shape works in; 0 where the shape is not supported.
size_t encoder_workspace(int batch, int length, int hidden, int intermediate);

// Launches on `stream` (a cudaStream_t) of the current device and returns at once: nullptr, or what is wrong. It is a
// memset and a kernel, and may be captured in a graph.
const char* encoder_cuda(const Encoder& encoder, void* stream);

}  // namespace fastbert
