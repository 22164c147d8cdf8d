// kth_largest_magnitude: launch. Reference: dirmerge/ops/kth_largest_magnitude.py.
#include "kth_largest_magnitude.cuh"
#include "launch.h"

namespace dirmerge::cuda {
namespace {

template <typename Bits, int COUNT>
int select(const int (&digits)[COUNT], const void* x, std::uint64_t k, void* result, void* workspace,
           std::int64_t tasks, std::int64_t size, std::int64_t stride_t, void* stream) {
    using namespace kth_largest_magnitude;
    KthState* const states = static_cast<KthState*>(workspace);
    uint64* const counts = reinterpret_cast<uint64*>(states + tasks);
    constexpr std::int64_t bytes = sizeof(Bits);
    const bool wide = aligned(x, stride_t * bytes, size * bytes);
    const int width = wide ? WIDEST<Bits> : 1;
    const auto histogram = wide ? kth_histogram_kernel<Bits, WIDEST<Bits>> : kth_histogram_kernel<Bits, 1>;
    const std::int64_t rounds = ceil_div(size, THREADS * width);
    const std::int64_t share_of_grid = ceil_div(BLOCKS, tasks > 0 ? tasks : 1);
    const std::int64_t shares = rounds < share_of_grid ? rounds : share_of_grid;

    int code = launch(kth_start_kernel, tasks, SELECT_THREADS, 0, stream, states, counts, tasks, k);
    int shift = 8 * static_cast<int>(sizeof(Bits)) - 1;
    for (const int digit_bits : digits) {
        shift -= digit_bits;
        if (code == SUCCESS)
            code = launch(histogram, tasks * shares, THREADS, 0, stream, static_cast<const Bits*>(x), states,
                          counts, tasks, size, stride_t, shares, shift, digit_bits);
        if (code == SUCCESS)
            code = launch(kth_select_kernel<Bits>, tasks, SELECT_THREADS, 0, stream, states, counts,
                          static_cast<Bits*>(result), tasks, digit_bits, shift == 0);
    }
    return code;
}

}  // namespace
}  // namespace dirmerge::cuda

// The bytes of memory on the device, aligned to 8, that a call for so many tasks works in.
DIRMERGE_EXPORT std::int64_t dirmerge_kth_largest_magnitude_workspace(std::int64_t tasks) {
    using namespace dirmerge::cuda;
    return tasks * static_cast<std::int64_t>(sizeof(KthState) + kth_largest_magnitude::BINS * sizeof(uint64));
}

// result[t] = the k-th largest |x[t]|, x: (tasks, size), each x[t] contiguous; result: (tasks,), the dtype of
// x.
DIRMERGE_EXPORT int dirmerge_kth_largest_magnitude(const void* x, std::int64_t k, void* result,
                                                   void* workspace, int dtype, std::int64_t tasks,
                                                   std::int64_t size, std::int64_t stride_t, void* stream) {
    using namespace dirmerge::cuda;
    using namespace kth_largest_magnitude;
    const auto rank = static_cast<std::uint64_t>(k);
    if (dtype == float64)
        return select<uint64>(DIGITS_64, x, rank, result, workspace, tasks, size, stride_t, stream);
    if (dtype == float32)
        return select<uint32>(DIGITS_32, x, rank, result, workspace, tasks, size, stride_t, stream);
    if (dtype == float16 || dtype == bfloat16)
        return select<unsigned short>(DIGITS_16, x, rank, result, workspace, tasks, size, stride_t, stream);
    return INVALID_VALUE;
}
