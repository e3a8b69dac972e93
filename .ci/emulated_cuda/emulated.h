// What the parts of the emulated device share: its memory, and the tape of a graph.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/extension.h>

#include <functional>
#include <vector>

namespace emulated {

c10::Allocator* memory();                // of the devices; fresh bytes are never zeros
c10::DeviceIndex current_device();       // of this thread
void set_current_device(c10::DeviceIndex index);
c10::DeviceIndex device_count();
bool is_pinned(const at::Storage& storage);

// To be called where the host waits for a real device: counts, and raises in the debug mode "error" or while recording.
void host_waits(const std::string& what);

// A graph is the list of what was done while it was recorded.
using Tape = std::vector<std::function<void()>>;
bool is_recording();
void record(std::function<void()> again);

void register_operations();
at::Tensor host_view(const at::Tensor& tensor);  // a CPU tensor over the same memory

// A backend of torch.distributed for tensors of one device.
c10::intrusive_ptr<c10d::Backend> make_collectives(const c10::intrusive_ptr<c10d::Backend>& gloo, int device);

}  // namespace emulated
