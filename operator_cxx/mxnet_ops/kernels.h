/* The kernel libraries beside this library. They are opened at run time, because both export the same names. */
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <thread>

#include "necklace.h"

namespace nkmx {

struct Kernels {
  decltype(&nk_error_string) error_string;
  decltype(&nk_focal_loss_workspace) focal_loss_workspace;
  decltype(&nk_focal_loss) focal_loss;
  decltype(&nk_retina_decode_workspace) retina_decode_workspace;
  decltype(&nk_retina_decode) retina_decode;

  explicit Kernels(const std::string& name) {
    Dl_info self;
    if (!dladdr(reinterpret_cast<const void*>(&anchor_), &self)) throw std::runtime_error("this library has no path");
    const std::string own = self.dli_fname;
    const std::string path = own.substr(0, own.rfind('/') + 1) + name;
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(std::string(dlerror()) + ": build it, make ops");
    find(library, "nk_error_string", error_string);
    find(library, "nk_focal_loss_workspace", focal_loss_workspace);
    find(library, "nk_focal_loss", focal_loss);
    find(library, "nk_retina_decode_workspace", retina_decode_workspace);
    find(library, "nk_retina_decode", retina_decode);
  }

  void check(int32_t status) const {
    if (status) throw std::runtime_error(error_string(status));
  }

 private:
  template <class Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) throw std::runtime_error(std::string(name) + " is missing: rebuild the operators with make ops");
  }

  static const char anchor_;
};

inline const char Kernels::anchor_ = 0;

/* Return the kernels of a device, opened on first use. */
inline const Kernels& kernels(bool gpu) {
  if (gpu) {
    static const Kernels cuda("necklace_cuda.so");
    return cuda;
  }
  static const Kernels cpu("necklace_cpu.so");
  return cpu;
}

/* Return the number of CPU threads: OMP_NUM_THREADS, as MXNet itself reads it, or that of the processor. */
inline intptr_t cpu_threads() {
  const char* setting = std::getenv("OMP_NUM_THREADS");
  const long count = setting ? std::strtol(setting, nullptr, 10) : 0;
  return count > 0 ? count : std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace nkmx
