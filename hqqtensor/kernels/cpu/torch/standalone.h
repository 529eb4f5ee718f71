// A process without the Python package: a C++ program that runs an exported model, or Python that has not imported hqqtensor.
#pragma once

namespace hqqtensor {

// Whether hqqtensor_define_operators() defined the operators of this process. The package, whose other backends serve what
// the compiled kernels do not, is then not there.
bool is_standalone();

}  // namespace hqqtensor

extern "C" {

// Defines the public operators, for a process that does not import hqqtensor. Call it after the library is loaded, before
// a model is. Calling it again does nothing, nor does it where the package is imported. Returns 0, or 1 if torch refuses.
__attribute__((visibility("default"))) int hqqtensor_define_operators() noexcept;
}
