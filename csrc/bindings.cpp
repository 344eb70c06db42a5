// Registers the compiled operators with PyTorch. The only file here that includes torch: it checks the tensors and
// hands raw pointers to the launchers.
//
// Nothing but PyTorch's stable ABI (from 2.10) and Python's limited API is used, so one build serves later versions.
#if __has_include(<Python.h>)
#include <Python.h>  // for the module below; torch.ops.load_library, which loads a build at first use, needs none
#define FASTBERT_MODULE
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "encoder_launch.h"
#include "lamb_launch.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using fastbert::LambBatch;
using Tensors = std::vector<Tensor>;

// Columns of `settings`, a row for each group.
enum Column { kCount, kLr, kLrIndex, kBeta1, kBeta2, kEps, kWeightDecay, kFlags, kColumns };
enum Flag { kBiasCorrection = 1, kGradAveraging = 2, kAdapt = 4 };

void* data(const Tensor& tensor, const Tensor& like, const char* list, size_t index) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "lamb_: ", list, "[", index, "] is not contiguous");
  STD_TORCH_CHECK(tensor.device() == like.device(), "lamb_: ", list, "[", index, "] is not where params[0] is");
  return tensor.mutable_data_ptr();
}

template <class T>
T* data(const Tensor& tensor, ScalarType type, const Tensor& like, const char* list, size_t index) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "lamb_: ", list, "[", index, "] is not ",
                  type == ScalarType::Float ? "float32" : "float64");
  return static_cast<T*>(data(tensor, like, list, index));
}

fastbert::LambType type_of(const Tensor& tensor, const char* list, size_t index) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "lamb_: ", list, "[", index, "] is not float32, float16 or bfloat16");
  return type == ScalarType::Float ? fastbert::kFloat
         : type == ScalarType::Half ? fastbert::kHalf
                                    : fastbert::kBFloat16;
}

struct Lists {
  const Tensors &params, &masters, &grads, &exp_avgs, &exp_avg_sqs, &steps, &lrs;

  fastbert::LambTensor tensor(size_t i) const {
    const int64_t numel = params[i].numel();
    for (const Tensors* list : {&masters, &grads, &exp_avgs, &exp_avg_sqs})
      STD_TORCH_CHECK((*list)[i].numel() == numel, "lamb_: the tensors at index ", i, " differ in size from params[", i,
                      "] of ", numel, " elements");
    STD_TORCH_CHECK(steps[i].numel() == 1, "lamb_: steps[", i, "] is not one number");
    const Tensor& like = params[0];
    fastbert::LambTensor t = {};
    t.weight = data(masters[i], like, "masters", i);
    t.copy = data(params[i], like, "params", i);
    t.grad = data(grads[i], like, "grads", i);
    t.exp_avg = data<float>(exp_avgs[i], ScalarType::Float, like, "exp_avgs", i);
    t.exp_avg_sq = data<float>(exp_avg_sqs[i], ScalarType::Float, like, "exp_avg_sqs", i);
    t.step = data<float>(steps[i], ScalarType::Float, like, "steps", i);
    t.numel = numel;
    t.weight_type = type_of(masters[i], "masters", i);
    t.copy_type = type_of(params[i], "params", i);
    t.grad_type = type_of(grads[i], "grads", i);
    const uintptr_t bits = reinterpret_cast<uintptr_t>(t.weight) | reinterpret_cast<uintptr_t>(t.copy) |
                           reinterpret_cast<uintptr_t>(t.grad) | reinterpret_cast<uintptr_t>(t.exp_avg) |
                           reinterpret_cast<uintptr_t>(t.exp_avg_sq);
    t.aligned = bits % 16 == 0;
    if (t.copy == t.weight) t.copy = nullptr;  // there is no master
    STD_TORCH_CHECK(t.copy == nullptr || (t.weight_type == fastbert::kFloat && t.copy_type != fastbert::kFloat),
                    "lamb_: masters[", i, "] is not params[", i, "] and not float32 for one of 16 bits");
    return t;
  }

  fastbert::LambGroup group(const double* row) const {
    fastbert::LambGroup group = {};
    const auto index = static_cast<int64_t>(row[kLrIndex]);
    group.lr = static_cast<float>(row[kLr]);
    if (index >= 0) {
      STD_TORCH_CHECK(index < static_cast<int64_t>(lrs.size()), "lamb_: there is no lrs[", index, "]");
      group.lr_pointer = data<float>(lrs[index], ScalarType::Float, params[0], "lrs", index);
    }
    group.beta1 = row[kBeta1];
    group.beta2 = row[kBeta2];
    group.eps = static_cast<float>(row[kEps]);
    group.weight_decay = static_cast<float>(row[kWeightDecay]);
    const int flags = static_cast<int>(row[kFlags]);
    group.bias_correction = flags & kBiasCorrection;
    group.grad_averaging = flags & kGradAveraging;
    group.adapt = flags & kAdapt;
    return group;
  }
};

using Batches = std::vector<std::unique_ptr<LambBatch>>;

// As many batches as the capacity of one asks for; their work is not set yet.
Batches gather(const Lists& lists, const Tensor& settings) {
  const size_t count = lists.params.size();
  for (const Tensors* list : {&lists.masters, &lists.grads, &lists.exp_avgs, &lists.exp_avg_sqs, &lists.steps})
    STD_TORCH_CHECK(list->size() == count, "lamb_: lists of ", count, " params, ", lists.masters.size(), " masters, ",
                    lists.grads.size(), " grads, ", lists.exp_avgs.size(), " exp_avgs, ", lists.exp_avg_sqs.size(),
                    " exp_avg_sqs, ", lists.steps.size(), " steps");
  STD_TORCH_CHECK(settings.dim() == 2 && settings.size(1) == kColumns && settings.is_contiguous() &&
                      settings.scalar_type() == ScalarType::Double && settings.is_cpu(),
                  "lamb_: settings is not a float64 matrix of ", int{kColumns}, " columns on the CPU");
  const auto* row = static_cast<const double*>(settings.mutable_data_ptr());
  const bool on_cuda = count > 0 && lists.params[0].is_cuda();
  const int chunk = on_cuda ? fastbert::kCudaChunk : fastbert::kCpuChunk;
  Batches batches;
  size_t i = 0;
  int groups = fastbert::kGroups;  // of the last batch
  for (int64_t g = 0; g < settings.size(0); ++g, row += kColumns) {
    const auto end = i + static_cast<size_t>(row[kCount]);
    STD_TORCH_CHECK(end <= count, "lamb_: settings counts more tensors than there are params");
    bool known = false;  // whether the last batch has this group
    for (; i < end; ++i, known = true) {
      const bool full = batches.empty() || batches.back()->count == fastbert::kBatch;
      if (full || (!known && groups == fastbert::kGroups)) {
        batches.push_back(std::make_unique<LambBatch>());
        groups = 0;
        known = false;
      }
      LambBatch& batch = *batches.back();
      if (!known) batch.groups[groups++] = lists.group(row);
      fastbert::LambTensor& tensor = batch.tensors[batch.count++] = lists.tensor(i);
      tensor.group = static_cast<uint8_t>(groups - 1);
      tensor.first_chunk = batch.chunks;
      batch.chunks += fastbert::lamb_chunks(tensor.numel, chunk);
    }
  }
  STD_TORCH_CHECK(i == count, "lamb_: settings counts ", i, " tensors, but there are ", count, " params");
  return batches;
}

// The memory of a step, in ints: first what must be zero before the norm, then the rest.
int64_t zeroed_ints(const Batches& batches) {
  int64_t ints = 4;  // norm_state, and two to keep the alignment
  for (const auto& batch : batches) ints += 4 + 2 * batch->count;
  return (ints + 3) / 4 * 4;
}

int64_t work_ints(const Batches& batches) {  // at least what carve takes
  int64_t ints = zeroed_ints(batches);
  for (const auto& batch : batches) ints += 4 * batch->count + static_cast<int64_t>(batch->chunks) * (4 + 2 + 2);
  return ints;
}

// Gives each batch its part of the workspace and of the totals.
void carve(const Batches& batches, int* memory, double* totals) {
  int* zeroed = memory + 4;
  int* rest = memory + zeroed_ints(batches);
  const auto take = [&rest](int64_t ints) { return std::exchange(rest, rest + ints); };
  int items = 0;
  for (const auto& batch : batches) items += fastbert::lamb_items(batch->chunks);
  double* norm_sums = reinterpret_cast<double*>(take(2 * static_cast<int64_t>(items)));
  auto* pairs = reinterpret_cast<fastbert::LambNorms*>(totals + 2);
  int first_item = 0;
  for (const auto& batch : batches) {
    fastbert::LambWork& work = batch->work;
    work.norm_state = memory;
    work.tickets = std::exchange(zeroed, zeroed + 4);
    work.arrived = std::exchange(zeroed, zeroed + batch->count);
    work.ready = std::exchange(zeroed, zeroed + batch->count);
    work.sums = reinterpret_cast<fastbert::LambNorms*>(take(4 * static_cast<int64_t>(batch->chunks)));
    work.next = take(2 * ((batch->chunks + 1) / 2));
    work.bias = reinterpret_cast<float*>(take(2 * static_cast<int64_t>(batch->count)));
    work.norm_sums = norm_sums;
    work.total = totals;
    work.totals = std::exchange(pairs, pairs + batch->count);
    batch->first_item = std::exchange(first_item, first_item + fastbert::lamb_items(batch->chunks));
    batch->items = items;
  }
}

const float* scalar(const std::optional<Tensor>& tensor, const Tensor& like, const char* name) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->numel() == 1, "lamb_: ", name, " is not one number");
  return data<float>(*tensor, ScalarType::Float, like, name, 0);
}

// Calls launch(batch, phases) for what is asked. One batch does all its phases in one launch; of several, the norms
// come first.
template <class Launch>
void course(const Batches& batches, int phases, const Launch& launch) {
  if (batches.size() == 1) return launch(*batches[0], phases);
  for (const int part : {phases & fastbert::kNorm, phases & ~fastbert::kNorm})
    for (const auto& batch : batches)
      if (part) launch(*batch, part);
}

#ifdef FASTBERT_CUDA
void run_cuda(const Batches& batches, int phases, int* memory, const Tensor& like) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto check = [](const char* error) { STD_TORCH_CHECK(error == nullptr, "lamb_: ", error); };
  if (phases & fastbert::kNorm) check(fastbert::clear_cuda(memory, zeroed_ints(batches) * sizeof(int), stream));
  course(batches, phases, [&](LambBatch& batch, int part) { check(fastbert::lamb_cuda(batch, part, stream)); });
}
#endif

void run_cpu(const Batches& batches, int phases, int* memory) {
  if (phases & fastbert::kNorm) std::fill_n(memory, zeroed_ints(batches), 0);
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  course(batches, phases, [&](LambBatch& batch, int part) {
    fastbert::lamb_cpu(batch, part, threads, [](int64_t count, const fastbert::Range& body) {
      torch::stable::parallel_for(0, count, 1, body);
    });
  });
}

Tensor lamb_(Tensors params, Tensors masters, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps,
             Tensors lrs, Tensor settings, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
             double max_grad_norm, Tensor totals, std::optional<Tensor> workspace, int64_t phases) {
  const Batches batches = gather({params, masters, grads, exp_avgs, exp_avg_sqs, steps, lrs}, settings);
  const Tensor& like = totals;
  STD_TORCH_CHECK(batches.empty() || params[0].device() == totals.device(), "lamb_: totals is not where params[0] is");
  STD_TORCH_CHECK(totals.numel() == 2 + 2 * static_cast<int64_t>(params.size()), "lamb_: totals has ", totals.numel(),
                  " elements, not two and two for each tensor");
  STD_TORCH_CHECK(phases >= 1 && phases <= 7 && ((phases & fastbert::kNorm) || workspace.has_value()),
                  "lamb_: phases is ", phases, ", and those after the norm need its workspace");
  const int64_t ints = work_ints(batches);
  // Nothing that is returned is an argument, as operators promise.
  const Tensor fresh = torch::stable::new_empty(like, {workspace.has_value() ? 0 : ints}, ScalarType::Int);
  const Tensor memory = workspace.has_value() ? *workspace : fresh;
  STD_TORCH_CHECK(memory.numel() == ints && memory.scalar_type() == ScalarType::Int,
                  "lamb_: workspace is not that of the norm of these tensors");
  if (batches.empty()) return fresh;
  auto* begin = static_cast<int*>(data(memory, like, "workspace", 0));
  carve(batches, begin, data<double>(totals, ScalarType::Double, like, "totals", 0));
  for (const auto& batch : batches) {
    batch->grad_scale = scalar(grad_scale, like, "grad_scale");
    batch->found_inf = scalar(found_inf, like, "found_inf");
    batch->max_grad_norm = max_grad_norm;
  }
#ifdef FASTBERT_CUDA
  if (like.is_cuda()) {
    run_cuda(batches, static_cast<int>(phases), begin, like);
    return fresh;
  }
#endif
  run_cpu(batches, static_cast<int>(phases), begin);
  return fresh;
}

#ifdef FASTBERT_CUDA
const void* encoder_data(const Tensor& tensor, ScalarType type, const Tensor& like, const char* what) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "encoder_layers: ", what, " has another dtype than expected");
  STD_TORCH_CHECK(tensor.is_contiguous(), "encoder_layers: ", what, " is not contiguous");
  STD_TORCH_CHECK(tensor.device() == like.device(), "encoder_layers: ", what, " is not where x is");
  return tensor.mutable_data_ptr();
}

// The layers of an encoder with weights of their own, from a list of twelve tensors for each, in the order of
// EncoderLayer; x is [batch, length, hidden].
void gather_layers(fastbert::Encoder& encoder, const Tensors& weights, const Tensor& x) {
  constexpr size_t kPerLayer = 12;
  const size_t layers = weights.size() / kPerLayer;
  STD_TORCH_CHECK(weights.size() % kPerLayer == 0 && layers >= 1 && layers <= fastbert::kEncoderLayers,
                  "encoder_layers: ", weights.size(), " weights are not twelve for each of 1 to ",
                  int{fastbert::kEncoderLayers}, " layers");
  const int64_t hidden = encoder.hidden, intermediate = encoder.intermediate;
  const auto matrix = [&](const Tensor& t, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns,
                    "encoder_layers: a matrix is not [", rows, ", ", columns, "]");
    return encoder_data(t, x.scalar_type(), x, "a matrix");
  };
  const auto vector = [&](const Tensor& t, int64_t size) {
    STD_TORCH_CHECK(t.numel() == size, "encoder_layers: a vector does not have ", size, " elements");
    return static_cast<const float*>(encoder_data(t, ScalarType::Float, x, "a vector"));
  };
  for (size_t i = 0; i < layers; ++i) {
    const Tensor* w = weights.data() + i * kPerLayer;
    encoder.layers[i] = {matrix(w[0], 3 * hidden, hidden), vector(w[1], 3 * hidden),
                         matrix(w[2], hidden, hidden),     vector(w[3], hidden),
                         vector(w[4], hidden),             vector(w[5], hidden),
                         matrix(w[6], intermediate, hidden), vector(w[7], intermediate),
                         matrix(w[8], hidden, intermediate), vector(w[9], hidden),
                         vector(w[10], hidden),            vector(w[11], hidden)};
  }
  for (int i = 0; i < encoder.applications; ++i)
    STD_TORCH_CHECK(encoder.layer_of[i] < layers, "encoder_layers: there is no layer ", int{encoder.layer_of[i]});
}

Tensor encoder_layers(Tensor x, Tensors weights, Tensor applications, std::optional<Tensor> mask, double eps,
                      int64_t activation) {
  STD_TORCH_CHECK(x.dim() == 3, "encoder_layers: x is not [batch, length, hidden]");
  const bool half = x.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(half || x.scalar_type() == ScalarType::BFloat16, "encoder_layers: x is not float16 or bfloat16");
  STD_TORCH_CHECK(weights.size() > 6 && weights[6].dim() == 2, "encoder_layers: there are not twelve weights");
  STD_TORCH_CHECK(applications.is_cpu() && applications.is_contiguous() &&
                      applications.scalar_type() == ScalarType::Byte && applications.numel() >= 1 &&
                      applications.numel() <= fastbert::kEncoderApplications,
                  "encoder_layers: applications are not 1 to ", int{fastbert::kEncoderApplications},
                  " uint8 numbers on the CPU");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "encoder_layers: there is no activation ", activation);
  const auto encoder = std::make_unique<fastbert::Encoder>();
  encoder->applications = static_cast<int>(applications.numel());
  std::copy_n(static_cast<const uint8_t*>(applications.mutable_data_ptr()), encoder->applications, encoder->layer_of);
  encoder->batch = static_cast<int>(x.size(0));
  encoder->length = static_cast<int>(x.size(1));
  encoder->hidden = static_cast<int>(x.size(2));
  encoder->intermediate = static_cast<int>(weights[6].size(0));
  gather_layers(*encoder, weights, x);
  encoder->eps = static_cast<float>(eps);
  encoder->activation = static_cast<fastbert::EncoderActivation>(activation);
  encoder->half = half;
  encoder->input = encoder_data(x, x.scalar_type(), x, "x");
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->numel() == x.size(0) * x.size(1), "encoder_layers: mask is not [batch, length]");
    encoder->mask = static_cast<const uint8_t*>(encoder_data(*mask, ScalarType::Bool, x, "mask"));
  }
  const size_t bytes = fastbert::encoder_workspace(encoder->batch, encoder->length, encoder->hidden,
                                                   encoder->intermediate);
  STD_TORCH_CHECK(bytes > 0, "encoder_layers: the kernel does not take this shape");
  const Tensor workspace = torch::stable::new_empty(x, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  const Tensor output = torch::stable::empty_like(x);
  encoder->workspace = workspace.mutable_data_ptr();
  encoder->output = output.mutable_data_ptr();
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* const error = fastbert::encoder_cuda(*encoder, stream);
  STD_TORCH_CHECK(error == nullptr, "encoder_layers: ", error);
  return output;
}
#endif

}  // namespace

// A fragment, because the Python side registers operators in the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(fastbert, library) {
  library.def(
      "lamb_(Tensor(a!)[] params, Tensor(b!)[] masters, Tensor[] grads, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor[] lrs, Tensor settings, Tensor? grad_scale, "
      "Tensor? found_inf, float max_grad_norm, Tensor(f!) totals, Tensor(g!)? workspace, int phases) -> Tensor");
  library.def(
      "encoder_layers(Tensor x, Tensor[] weights, Tensor applications, Tensor? mask, float eps, int activation) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastbert, CPU, library) { library.impl("lamb_", TORCH_BOX(&lamb_)); }

#ifdef FASTBERT_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastbert, CUDA, library) {
  library.impl("lamb_", TORCH_BOX(&lamb_));
  library.impl("encoder_layers", TORCH_BOX(&encoder_layers));
}
#endif

#ifdef FASTBERT_MODULE
// `import fastbert._C` loads this library, which registers the operators above; the module itself is empty.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Compiled operators of fastbert",
                               -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
