// NCCL's collectives: those of gloo in the memory of the host, with NCCL's refusals.

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

#include "emulated.h"

namespace emulated {
namespace {

using Tensors = std::vector<at::Tensor>;
using Work = c10::intrusive_ptr<c10d::Work>;
using c10d::OpType;

// A collective that has ended: gloo is waited for, as nothing runs beside the host.
struct Ended final : c10d::Work {
  Ended(int rank, OpType type, Tensors outputs) : c10d::Work(rank, type), outputs_(std::move(outputs)) {
    future_->markCompleted(c10::IValue(outputs_));
  }
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
  void synchronize() override {}
  Tensors result() override { return outputs_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

 private:
  Tensors outputs_;
  c10::intrusive_ptr<c10::ivalue::Future> future_ =
      c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
};

class Collectives final : public c10d::Backend {
 public:
  Collectives(c10::intrusive_ptr<c10d::Backend> gloo, int device)
      : c10d::Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)), device_(device) {}

  const std::string getBackendName() const override { return "nccl"; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }
  void shutdown() override { gloo_->shutdown(); }
  void abort() override { gloo_->abort(); }

  // FSDP asks for several collectives at once. Here each has ended when the next one begins.
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override {}
  Work endCoalescing() override { return ended(OpType::COALESCED, {}); }

  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    Tensors views = checked(tensors);
    gloo_->broadcast(views, options)->wait();
    return ended(OpType::BROADCAST, tensors);
  }

  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    Tensors views = checked(tensors);
    reduce_over_ranks(views, options.reduceOp);
    return ended(OpType::ALLREDUCE, tensors);
  }

  Work allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    for (at::Tensor& view : checked(tensors)) {
      Tensors one{view};
      reduce_over_ranks(one, options.reduceOp);
    }
    return ended(OpType::ALLREDUCE_COALESCED, tensors);
  }

  Work allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    Tensors from = checked(inputs);
    std::vector<Tensors> to;
    for (const Tensors& tensors : outputs) to.push_back(checked(tensors));
    gloo_->allgather(to, from, options)->wait();
    return ended(OpType::ALLGATHER, outputs.at(0));
  }

  Work gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    Tensors from = checked(inputs);
    std::vector<Tensors> to;
    for (const Tensors& tensors : outputs) to.push_back(checked(tensors));
    gloo_->gather(to, from, options)->wait();
    return ended(OpType::GATHER, outputs.empty() ? Tensors{} : outputs[0]);
  }

  Work scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override {
    Tensors to = checked(outputs);
    std::vector<Tensors> from;
    for (const Tensors& tensors : inputs) from.push_back(checked(tensors));
    gloo_->scatter(to, from, options)->wait();
    return ended(OpType::SCATTER, outputs);
  }

  Work _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    TORCH_CHECK_VALUE(input.numel() * size_ == output.numel(), "output must have world_size times the input's elements");
    Tensors from{checked({input})[0].view(-1)};
    std::vector<Tensors> to{checked({output})[0].view({size_, -1}).unbind(0)};
    gloo_->allgather(to, from, options)->wait();
    return ended(OpType::_ALLGATHER_BASE, {output});
  }

  Work allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    for (size_t i = 0; i < inputs.size(); ++i) _allgather_base(outputs[i], inputs[i], options);
    return ended(OpType::COALESCED, outputs);
  }

  Work _reduce_scatter_base(at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
    Tensors all{checked({input})[0].clone()};
    reduce_over_ranks(all, options.reduceOp);
    const at::Tensor own = checked({output})[0].view(-1);
    own.copy_(all[0].view(-1).narrow(0, rank_ * own.numel(), own.numel()));
    return ended(OpType::_REDUCE_SCATTER_BASE, {output});
  }

  Work barrier(const c10d::BarrierOptions& options) override {
    host_waits("a barrier");
    c10d::BarrierOptions without_devices;
    without_devices.timeout = options.timeout;
    gloo_->barrier(without_devices)->wait();
    return ended(OpType::BARRIER, {});
  }

 private:
  // The host's views of tensors that NCCL takes.
  Tensors checked(const Tensors& tensors) const {
    TORCH_CHECK(!is_recording(), "collectives in graphs are not emulated");
    Tensors views;
    for (const at::Tensor& tensor : tensors) {
      TORCH_CHECK_VALUE(tensor.is_cuda(), "Tensors must be CUDA and dense, got one on ", tensor.device());
      TORCH_CHECK_VALUE(tensor.is_contiguous(tensor.suggest_memory_format()), "Tensors must be contiguous");
      TORCH_CHECK_VALUE(tensor.device().index() == device_, "the device of rank ", rank_, " is ", device_, ", got ",
                        tensor.device());
      views.push_back(host_view(tensor));
    }
    return views;
  }

  void reduce_over_ranks(Tensors& views, const c10d::ReduceOp& operation) {
    const auto kind = static_cast<c10d::ReduceOp::RedOpType>(operation);
    TORCH_CHECK_VALUE(kind < c10d::ReduceOp::BAND, "Cannot use this ReduceOp with NCCL");
    const bool is_mean = kind == c10d::ReduceOp::AVG;
    c10d::AllreduceOptions options;
    options.reduceOp = is_mean ? c10d::ReduceOp::SUM : kind;
    gloo_->allreduce(views, options)->wait();
    if (is_mean)
      for (at::Tensor& view : views) view.div_(size_, view.is_floating_point() ? std::nullopt : std::optional("trunc"));
  }

  Work ended(OpType type, const Tensors& outputs) const { return c10::make_intrusive<Ended>(rank_, type, outputs); }

  c10::intrusive_ptr<c10d::Backend> gloo_;
  int device_;
};

}  // namespace

c10::intrusive_ptr<c10d::Backend> make_collectives(const c10::intrusive_ptr<c10d::Backend>& gloo, int device) {
  return c10::make_intrusive<Collectives>(gloo, device);
}

}  // namespace emulated

namespace c10d {
namespace {

// DistributedDataParallel asks for one when it is made.
struct NoTimer final : Timer {
  explicit NoTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, NoTimer)

}  // namespace
}  // namespace c10d
