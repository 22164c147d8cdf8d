// What the library says of itself: how it was built, and what its error codes mean.
#include "launch.h"

// Lines of "key: value".
DIRMERGE_EXPORT const char* dirmerge_cuda_build_info();

// The meaning of a code that a launcher returned.
DIRMERGE_EXPORT const char* dirmerge_cuda_error(int code);

// 0 if this machine's driver and GPU can run the kernels, else the code that a launch would return.
DIRMERGE_EXPORT int dirmerge_cuda_status();

#if defined(SIMT_EMULATED)

int dirmerge_cuda_status() { return dirmerge::cuda::SUCCESS; }

const char* dirmerge_cuda_build_info() { return "compiler: " __VERSION__ "\nbuilt_for: the CPU, emulated"; }

const char* dirmerge_cuda_error(int code) {
    return code == dirmerge::cuda::INVALID_VALUE ? "invalid argument" : simt::machine.error.c_str();
}

// order: of the threads, see simt.h. max_blocks: of a grid.
DIRMERGE_EXPORT void dirmerge_simt_configure(int order, std::int64_t max_blocks) {
    simt::machine.order = order;
    simt::machine.max_blocks = max_blocks;
}

// Blocks of the grid and threads of a block of the last launch.
DIRMERGE_EXPORT void dirmerge_simt_last_launch(unsigned* blocks, unsigned* threads) {
    *blocks = simt::machine.grid.x;
    *threads = simt::machine.block.x;
}

#else

#define DIRMERGE_STRING_(x) #x
#define DIRMERGE_STRING(x) DIRMERGE_STRING_(x)
#define DIRMERGE_NVCC                                                  \
    "nvcc " DIRMERGE_STRING(__CUDACC_VER_MAJOR__) "." DIRMERGE_STRING( \
        __CUDACC_VER_MINOR__) "." DIRMERGE_STRING(__CUDACC_VER_BUILD__)

const char* dirmerge_cuda_build_info() {
    return "version: " DIRMERGE_VERSION "\ncompiler: " DIRMERGE_NVCC "\nbuilt_for: " DIRMERGE_ARCHITECTURES;
}

// Compiled for the same architectures as all others.
__global__ void probe_kernel() {}

int dirmerge_cuda_status() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, probe_kernel);
}

const char* dirmerge_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

#endif
