// What the two halves of the emulated device share: its memory and its tape.
#pragma once

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

}  // namespace emulated
