// What the launchers share: the launch itself, element types by number, and the C ABI's conventions.
//
// Every launcher is `extern "C" int dirmerge_<op>(…, void* stream)`: addresses on the device, sizes and
// strides in elements, a dtype (see DType), a CUDA stream. It enqueues its kernels, waits for nothing, and
// returns a CUDA error code, 0 for success. Arguments are validated by the caller; shapes without entries
// launch nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "elements.cuh"

#if !defined(SIMT_EMULATED)
#include <cuda_runtime.h>
#endif

#define DIRMERGE_EXPORT extern "C" __attribute__((visibility("default")))

namespace dirmerge::cuda {

enum DType : int { bfloat16 = 0, float16 = 1, float32 = 2, float64 = 3 };

constexpr int SUCCESS = 0;
constexpr int INVALID_VALUE = 1;  // cudaErrorInvalidValue

// Launches a one-dimensional grid of up to `blocks` blocks. A kernel strides over its work by gridDim.x,
// because a grid ends at 2^31 − 1 blocks and work need not.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), std::int64_t blocks, unsigned threads, std::size_t shared_bytes,
           void* stream, Arguments... arguments) {
    if (blocks <= 0) return SUCCESS;
#if defined(SIMT_EMULATED)
    static_cast<void>(stream);
    const std::int64_t most = simt::machine.max_blocks;
    return simt::launch(dim3(static_cast<unsigned>(blocks < most ? blocks : most)), dim3(threads),
                        shared_bytes, [=] { kernel(static_cast<Parameters>(arguments)...); });
#else
    constexpr std::int64_t most = 0x7FFFFFFF;
    constexpr std::size_t without_asking = 48 << 10;
    if (shared_bytes > without_asking) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks < most ? blocks : most));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
}

// Calls body(T{}) with the element type of dtype, float64 excluded; another number is an invalid value.
template <typename Body>
int with_single(int dtype, const Body& body) {
    if (dtype == bfloat16) return body(BFloat16{});
    if (dtype == float16) return body(Float16{});
    if (dtype == float32) return body(float{});
    return INVALID_VALUE;
}

// Calls body(T{}) with the element type of dtype.
template <typename Body>
int with_element(int dtype, const Body& body) {
    return dtype == float64 ? body(double{}) : with_single(dtype, body);
}

// Whether a base address and strides in bytes let every row start at a multiple of 16 bytes.
template <typename... Strides>
bool aligned(const void* address, Strides... strides) {
    return reinterpret_cast<std::uintptr_t>(address) % 16 == 0 && ((strides % 16 == 0) && ...);
}

}  // namespace dirmerge::cuda
