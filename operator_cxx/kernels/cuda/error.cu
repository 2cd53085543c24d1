/* nk_error_string of the CUDA library. */
#include <cuda_runtime.h>

#include "necklace.h"

const char* nk_error_string(int32_t status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
