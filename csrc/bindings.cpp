// Registers the compiled operators with PyTorch. The only file here that includes torch: it checks the tensors and
// hands raw pointers to the launchers.
//
// Nothing but PyTorch's stable ABI (from 2.10) and Python's limited API is used, so one build serves later versions.
#include <Python.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "lamb.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

float* data(const Tensor& tensor, const Tensor& like, const char* list, size_t index) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "lamb_: ", list, "[", index, "] is not float32");
  STD_TORCH_CHECK(tensor.is_contiguous(), "lamb_: ", list, "[", index, "] is not contiguous");
  STD_TORCH_CHECK(tensor.device() == like.device(), "lamb_: ", list, "[", index, "] is not where params[0] is");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// The non-empty tensors of the group as raw pointers.
std::vector<fastbert::LambTensor> gather(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                         const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count,
                  "lamb_: lists of ", count, " params, ", grads.size(), " grads, ", exp_avgs.size(), " exp_avgs, ",
                  exp_avg_sqs.size(), " exp_avg_sqs");
  std::vector<fastbert::LambTensor> group;
  group.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = params[i].numel();
    STD_TORCH_CHECK(grads[i].numel() == numel && exp_avgs[i].numel() == numel && exp_avg_sqs[i].numel() == numel,
                    "lamb_: the tensors at index ", i, " differ in size from params[", i, "] of ", numel, " elements");
    if (numel == 0) continue;
    group.push_back({data(params[i], params[0], "params", i), data(grads[i], params[0], "grads", i),
                     data(exp_avgs[i], params[0], "exp_avgs", i),
                     data(exp_avg_sqs[i], params[0], "exp_avg_sqs", i), numel});
  }
  return group;
}

#ifdef FASTBERT_CUDA
void launch_cuda(const fastbert::LambStep& step, const std::vector<fastbert::LambTensor>& group, const Tensor& like) {
  int64_t chunks = 0;
  for (const auto& tensor : group) chunks += fastbert::lamb_chunks(tensor.numel);
  constexpr int64_t kDoubles = sizeof(fastbert::LambNorms) / sizeof(double);
  const Tensor scratch = torch::stable::new_empty(like, {chunks * kDoubles}, ScalarType::Double);
  auto* sums = static_cast<fastbert::LambNorms*>(scratch.mutable_data_ptr());
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = fastbert::lamb_cuda(step, group, sums, device, stream);
  STD_TORCH_CHECK(error == nullptr, "lamb_: ", error);
}
#endif

void lamb_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, int64_t step, double lr, double beta1, double beta2, double eps,
           double weight_decay, bool bias_correction, bool grad_averaging, bool always_adapt, double grad_scale) {
  const auto group = gather(params, grads, exp_avgs, exp_avg_sqs);
  if (group.empty()) return;
  const auto scalars = fastbert::make_lamb_step(step, lr, beta1, beta2, eps, weight_decay, bias_correction,
                                                grad_averaging, always_adapt, grad_scale);
#ifdef FASTBERT_CUDA
  if (params[0].is_cuda()) return launch_cuda(scalars, group, params[0]);
#endif
  fastbert::lamb_cpu(scalars, group, [](int64_t count, const fastbert::Range& body) {
    torch::stable::parallel_for(0, count, 1, body);
  });
}

}  // namespace

// A fragment, because the Python side registers operators in the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(fastbert, library) {
  library.def(
      "lamb_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, *, int step, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, bool bias_correction, bool grad_averaging, "
      "bool always_adapt, float grad_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastbert, CPU, library) { library.impl("lamb_", TORCH_BOX(&lamb_)); }

#ifdef FASTBERT_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastbert, CUDA, library) { library.impl("lamb_", TORCH_BOX(&lamb_)); }
#endif

// `import fastbert._C` loads this library, which registers the operators above; the module itself is empty.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Compiled operators of fastbert: torch.ops.fastbert.lamb_",
                               -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
