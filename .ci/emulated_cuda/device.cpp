// A CUDA device whose memory is the host's: allocators, device guard and hooks, for builds of PyTorch without CUDA.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_set>

#include "emulated.h"

namespace emulated {
namespace {

constexpr size_t ALIGNMENT = 512;
constexpr int GARBAGE = 0xA5;

c10::DeviceIndex count = 1;
thread_local c10::DeviceIndex current = 0;
thread_local c10::StreamId current_stream = 0;

std::mutex guard;  // of what follows
size_t allocated_bytes = 0, peak_bytes = 0;
std::unordered_set<const void*> pinned;

bool waiting_is_an_error = false;
int64_t waits = 0;
std::shared_ptr<Tape> tape;  // of the graph that is being recorded

struct Block {
  void* address;
  size_t bytes;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  std::lock_guard<std::mutex> held(guard);
  allocated_bytes -= block->bytes;
  std::free(block->address);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::DeviceType::CUDA, current);
    if (bytes == 0) return {nullptr, nullptr, nullptr, device};
    bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void* address = std::aligned_alloc(ALIGNMENT, bytes);
    TORCH_CHECK(address, "CUDA out of memory");
    std::memset(address, GARBAGE, bytes);
    std::lock_guard<std::mutex> held(guard);
    allocated_bytes += bytes;
    peak_bytes = std::max(peak_bytes, allocated_bytes);
    return {address, new Block{address, bytes}, &free_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

void free_pinned(void* address) {
  std::lock_guard<std::mutex> held(guard);
  pinned.erase(address);
  std::free(address);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* address = std::aligned_alloc(ALIGNMENT, (std::max<size_t>(bytes, 1) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    TORCH_CHECK(address, "out of pinned memory");
    std::lock_guard<std::mutex> held(guard);
    pinned.insert(address);
    return {address, address, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Memory device_memory;
PinnedMemory pinned_memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device getDevice() const override { return {type(), current}; }
  void setDevice(c10::Device device) const override { set_current_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { set_current_device(device.index()); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return count; }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, current_stream);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_stream = stream.id();
    return before;
  }
  // Every operation has ended when it returns, so that nothing is left to wait for.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return count; }
  int getNumGPUs() const override { return count; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current = index; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  c10::Device getDeviceFromPtr(void*) const override { return {c10::DeviceType::CUDA, current}; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* address) const override {
    std::lock_guard<std::mutex> held(guard);
    return pinned.count(address) > 0;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(0); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::detail::createCPUGenerator(0);
    return generator;
  }
};

}  // namespace

c10::Allocator* memory() { return &device_memory; }
c10::DeviceIndex current_device() { return current; }
c10::DeviceIndex device_count() { return count; }

void set_current_device(c10::DeviceIndex index) {
  if (index >= 0) current = index;
}

bool is_pinned(const at::Storage& storage) {
  std::lock_guard<std::mutex> held(guard);
  return pinned.count(storage.data()) > 0;
}

void host_waits(const std::string& what) {
  ++waits;
  TORCH_CHECK(!tape, "operation not permitted when stream is capturing: ", what);
  TORCH_CHECK(!waiting_is_an_error, "called a synchronizing CUDA operation: ", what);
}

bool is_recording() { return tape != nullptr; }
void record(std::function<void()> again) { tape->push_back(std::move(again)); }

}  // namespace emulated

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace emulated;
  // Torch looks for the hooks of CUDA once, when it is imported, and finds those that refuse: these take their place.
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
  c10::SetAllocator(c10::DeviceType::CUDA, &device_memory, 255);
  register_operations();

  m.def("set_device_count", [](int devices) { count = static_cast<c10::DeviceIndex>(devices); });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("set_device", [](int index) { set_current_device(static_cast<c10::DeviceIndex>(index)); });
  m.def("set_stream", [](int64_t stream) { current_stream = stream; });
  m.def("memory_allocated", [] { return allocated_bytes; });
  m.def("max_memory_allocated", [] { return peak_bytes; });
  m.def("reset_peak_memory_stats", [] { peak_bytes = allocated_bytes; });
  m.def("make_waiting_an_error", [](bool error) { waiting_is_an_error = error; });
  m.def("is_waiting_an_error", [] { return waiting_is_an_error; });
  m.def("host_waits", &host_waits);
  m.def("host_view", &host_view);
  m.def("make_collectives", &make_collectives);
  m.def("resize_storage", [](const at::Tensor& whole, int64_t bytes) {
    c10::Storage storage = whole.storage();
    const c10::DeviceGuard on(whole.device());
    c10::DataPtr data = device_memory.allocate(bytes);
    if (const size_t kept = std::min<size_t>(bytes, storage.nbytes())) std::memcpy(data.get(), storage.data(), kept);
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  });
  m.def("is_recording", &is_recording);
  m.def("begin_recording", [] { tape = std::make_shared<Tape>(); });
  m.def("end_recording", [] {
    const std::shared_ptr<Tape> recorded = std::move(tape);
    return py::cpp_function([recorded] {
      at::NoGradGuard no_grad;
      for (const auto& again : *recorded) again();
    });
  });
  // Calls a function; while a graph is recorded, what it does is one piece of that.
  m.def("run_and_record", [](const py::function& function) {
    const std::shared_ptr<Tape> recorded = std::move(tape);
    function();
    tape = recorded;
    if (tape) record([kept = std::make_shared<py::function>(function)] { (*kept)(); });
  });
}
