// The operations of the emulated device: those of the CPU, on its memory, with the refusals of a real device.

#include <ATen/EmptyTensor.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/view_native.h>

#include <set>

#include "emulated.h"

namespace emulated {
namespace {

using c10::Device;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Stack;

bool is_on_device(const at::Tensor& tensor) { return tensor.defined() && tensor.device().is_cuda(); }

at::Tensor shaped(at::Tensor made, const at::Tensor& as) {
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(as.sizes(), as.strides(), as.storage_offset());
  if (as.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  made._set_conj(as.is_conj());
  made._set_neg(as.is_neg());
  return made;
}

at::Tensor on_storage(c10::Storage storage, const at::Tensor& as, DispatchKey key) {
  return shaped(at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), as.dtype()), as);
}

// An inference tensor if its base is one, whatever the mode is now.
at::Tensor view_of(const at::Tensor& base, const at::Tensor& as) {
  return shaped(at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
                                                         base.key_set(), as.dtype()), as);
}

c10::Storage copied(const c10::Storage& storage, Device device) {
  const c10::DeviceGuard on(device);
  c10::DataPtr data = memory()->allocate(storage.nbytes());
  if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), memory(), true};
}

// ---- every operation without a kernel below

const std::set<std::string> WAITS = {
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::equal",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount", "aten::_linalg_svd",
    "aten::_linalg_eigh"};
const std::set<std::string> TAKES_INDICES_OF_THE_HOST = {"aten::index", "aten::index_put", "aten::index_put_",
                                                         "aten::_index_put_impl_", "aten::_unsafe_index"};

// One call of an operation: its arguments over the host's memory, and the way back of its results.
class Call {
 public:
  Call(const c10::OperatorHandle& operation, const std::vector<at::Tensor>* outputs)
      : operation_(operation), name_(operation.schema().name()), outputs_(outputs) {}

  IValue to_host(const IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor tensor : value.toTensorList()) tensors.push_back(to_host(tensor));
      return tensors;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
        has_mask_ = has_mask_ || (tensor && is_on_device(*tensor) && tensor->scalar_type() == at::kBool);
        tensors.push_back(tensor ? std::optional<at::Tensor>(to_host(*tensor)) : tensor);
      }
      return tensors;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      device_ = value.toDevice().has_index() ? value.toDevice() : Device(c10::DeviceType::CUDA, current_device());
      return Device(c10::DeviceType::CPU);
    }
    return value;
  }

  // Refuses what a device refuses, once all arguments are known.
  void check() const {
    const bool takes_indices = TAKES_INDICES_OF_THE_HOST.count(name_) > 0;
    TORCH_CHECK(!on_host_ || pairs_.empty() || takes_indices,
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", name_,
                ", of the host's ", *on_host_, ")");
    if (on_host_ && takes_indices) host_waits("indices on the host");
    if (WAITS.count(name_)) host_waits(name_);
    if (name_ == "aten::repeat_interleave" && operation_.schema().overload_name() == "Tensor") host_waits(name_);
    if (has_mask_ && name_.find("index_put") == std::string::npos) host_waits("a mask as an index");
  }

  // What the operation resized moves into memory of the device.
  void take_over_sizes() {
    for (const auto& [tensor, view] : pairs_) {
      if (view.sizes() == tensor.sizes() && view.strides() == tensor.strides() &&
          view.storage().nbytes() == tensor.storage().nbytes())
        continue;
      auto* impl = tensor.unsafeGetTensorImpl();
      impl->set_storage_keep_dtype(copied(view.storage(), tensor.device()));
      impl->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
    }
  }

  IValue to_device(const IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> tensors;
    for (const at::Tensor tensor : value.toTensorList()) tensors.push_back(to_device(tensor));
    return tensors;
  }

  std::vector<at::Tensor> made;  // by this call: neither arguments nor views of them

 private:
  at::Tensor to_host(const at::Tensor& tensor) {
    if (!is_on_device(tensor)) {
      if (tensor.defined() && tensor.dim() > 0) on_host_ = c10::str(tensor.sizes());
      return tensor;
    }
    TORCH_CHECK(pairs_.empty() || tensor.device() == *device_ || tensor.dim() == 0,
                "Expected all tensors to be on the same device, but found ", *device_, " and ", tensor.device(), " (",
                name_, ")");
    if (!device_ || tensor.dim() > 0) device_ = tensor.device();
    for (const auto& [known, view] : pairs_)
      if (known.is_same(tensor)) return view;
    pairs_.emplace_back(tensor, host_view(tensor));
    return pairs_.back().second;
  }

  at::Tensor to_device(const at::Tensor& result) {
    if (!result.defined() || !device_) return result;
    for (const auto& [tensor, view] : pairs_)
      if (view.is_same(result)) return tensor;
    for (const auto& [tensor, view] : pairs_)
      if (result.storage().data() && view.storage().data() == result.storage().data())
        return view_of(tensor, result);
    if (outputs_) {  // a replay writes where the recording wrote
      made.push_back((*outputs_)[made.size()]);
      host_view(made.back()).copy_(result);
    } else {
      made.push_back(on_storage(copied(result.storage(), *device_), result, DispatchKey::CUDA));
    }
    return made.back();
  }

  const c10::OperatorHandle& operation_;
  const std::string& name_;
  const std::vector<at::Tensor>* outputs_;
  std::optional<Device> device_;
  std::optional<std::string> on_host_;
  bool has_mask_ = false;  // among indices
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;  // arguments, and the views of the host on them
};

IValue with_own_list(const IValue& value) {
  return value.isTensorList() ? IValue(value.toTensorList().copy()) : value;
}

std::vector<at::Tensor> run(const c10::OperatorHandle& operation, Stack* stack, const std::vector<at::Tensor>* outputs) {
  Call call(operation, outputs);
  const size_t arguments = operation.schema().arguments().size(), results = operation.schema().returns().size();
  for (size_t i = stack->size() - arguments; i < stack->size(); ++i) (*stack)[i] = call.to_host((*stack)[i]);
  call.check();
  {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    operation.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  }
  call.take_over_sizes();
  for (size_t i = stack->size() - results; i < stack->size(); ++i) (*stack)[i] = call.to_device((*stack)[i]);
  return call.made;
}

void fallback(const c10::OperatorHandle& operation, DispatchKeySet, Stack* stack) {
  Stack before;
  if (is_recording())
    for (size_t i = stack->size() - operation.schema().arguments().size(); i < stack->size(); ++i)
      before.push_back(with_own_list((*stack)[i]));
  const std::vector<at::Tensor> made = run(operation, stack, nullptr);
  if (is_recording())
    record([operation, before, made] {
      Stack again = before;
      run(operation, &again, &made);
    });
}

// ---- kernels of its own: what makes tensors, and what crosses to the host

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard on(device);
  TORCH_CHECK(current_device() < device_count(), "CUDA error: invalid device ordinal");
  return at::detail::empty_generic(size, memory(), DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard on(device);
  TORCH_CHECK(current_device() < device_count(), "CUDA error: invalid device ordinal");
  return at::detail::empty_strided_generic(size, stride, memory(), DispatchKeySet(DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  const auto is_free = [&](const at::Tensor& host) { return non_blocking && is_pinned(host.storage()); };
  if (!is_on_device(to) && !is_free(to)) host_waits("a copy to the host");
  if (!is_on_device(from) && from.dim() > 0 && from.numel() > 0 && !is_free(from)) {
    TORCH_CHECK(!is_recording(), "operation not permitted when stream is capturing: a copy of memory that is not pinned");
    if (!non_blocking) host_waits("a copy from the host");
  }
  const auto copy = [to, from] {
    const at::NoGradGuard no_grad;
    host_view(to).copy_(host_view(from));
  };
  copy();
  if (is_recording()) record(copy);
  return to;
}

at::Tensor _copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  at::Tensor target = to;
  return copy_(target, from, non_blocking);
}

at::Scalar item(const at::Tensor& tensor) {
  host_waits("item");
  return host_view(tensor).item();
}

at::Tensor view(const at::Tensor& tensor, at::IntArrayRef size) { return at::native::view(tensor, size); }

at::Tensor strided(const at::Tensor& tensor, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  at::Tensor made = view_of(tensor, tensor);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(tensor.storage_offset()));
  return made;
}

at::Tensor reshape_alias(const at::Tensor& tensor, at::IntArrayRef size, at::IntArrayRef stride) {
  return strided(tensor, size, stride, std::nullopt);
}

const at::Tensor& resize_(const at::Tensor& tensor, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const size_t bytes = (impl->storage_offset() + impl->numel()) * tensor.itemsize();
  c10::Storage storage = impl->unsafe_storage();  // shares what it points to
  if (bytes > storage.nbytes()) {
    c10::DataPtr data = memory()->allocate(bytes);
    if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(0);
  impl->set_sizes_contiguous(size);
  if (!stride.empty()) impl->set_sizes_and_strides(size, stride);
  impl->set_storage_offset(offset);
  return tensor;
}

at::Tensor& set_whole_storage(at::Tensor& tensor, at::Storage source) {
  const int64_t elements = static_cast<int64_t>(source.nbytes() / tensor.itemsize());
  return set_storage(tensor, std::move(source), 0, {elements}, {});
}

at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& source) {
  return set_storage(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& tensor) {
  return set_storage(tensor, {c10::Storage::use_byte_size_t(), 0, memory()->allocate(0), memory(), true}, 0, {0}, {});
}

void record_stream(at::Tensor&, c10::Stream) {}

// A device rounds roots correctly; MKL, which has those of the CPU, does not.
at::Tensor rounded_sqrt(const at::Tensor& tensor) {
  if (!tensor.is_floating_point()) return rounded_sqrt(tensor.to(at::kFloat));
  at::Tensor root = tensor.to(tensor.scalar_type() == at::kFloat ? at::kDouble : tensor.scalar_type(), false, true);
  at::sqrt_out(root, root);
  return root.to(tensor.scalar_type());
}

// A device counts integers too, which the CPU refuses.
at::Tensor counted(const at::Tensor& tensor, int64_t bins, const at::Scalar& min, const at::Scalar& max) {
  if (!tensor.is_floating_point()) return at::histc(tensor.to(at::kDouble), bins, min, max).to(tensor.scalar_type());
  at::Tensor counts = at::empty({0}, tensor.options());
  return at::histc_out(counts, tensor, bins, min, max);
}

int64_t unfused_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
                          bool, std::optional<double>, bool) {
  return 0;
}

}  // namespace

at::Tensor host_view(const at::Tensor& tensor) {
  if (!is_on_device(tensor)) return tensor;
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::Storage& storage = tensor.storage();
  auto* kept = new c10::Storage(storage);
  c10::DataPtr data(storage.mutable_data(), kept, [](void* of) { delete static_cast<c10::Storage*>(of); },
                    Device(c10::DeviceType::CPU));
  c10::Storage over(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                    c10::GetAllocator(c10::DeviceType::CPU), true);
  return on_storage(std::move(over), tensor, DispatchKey::CPU);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("_copy_from", _copy_from);
  library.impl("_local_scalar_dense", item);
  library.impl("view", view);
  library.impl("as_strided", strided);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("resize_", resize_);
  library.impl("set_", set_nothing);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("record_stream", record_stream);
  library.impl("sqrt", rounded_sqrt);
  library.impl("histc", counted);
}

void register_operations() {
  // What has a kernel of its own on CPUs has one here too, as on a real device, before kernels composed of others.
  static torch::Library library(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto operation = dispatcher.findOp(name);
    if (name.getNamespace() != "aten" || !operation || !operation->hasKernelForDispatchKey(DispatchKey::CPU) ||
        operation->hasKernelForDispatchKey(DispatchKey::CUDA))
      continue;
    library.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&unfused_attention);
}

}  // namespace emulated
