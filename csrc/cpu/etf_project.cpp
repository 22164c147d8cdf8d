// etf_project: K/(K − 1) (Z − 1 1ᵀ Z / K), column sums and centring panel by panel of columns.
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

// A panel of K rows is read twice and should stay in the second-level cache between.
constexpr std::int64_t panel_bytes = 1 << 20;
constexpr std::int64_t max_width = 512;
constexpr std::int64_t min_width = 64;

template <typename T>
void project_panel(const T* core, std::int64_t K, std::int64_t n, std::int64_t width, T* result) {
    using V = Compute<T>;
    double sums[max_width] = {};
    for (std::int64_t i = 0; i < K; ++i)
        for (std::int64_t j = 0; j < width; ++j) sums[j] += static_cast<double>(widen(core[i * n + j]));
    V means[max_width];
    for (std::int64_t j = 0; j < width; ++j) means[j] = static_cast<V>(sums[j] / static_cast<double>(K));
    const V factor = static_cast<V>(static_cast<double>(K) / static_cast<double>(K - 1));
    for (std::int64_t i = 0; i < K; ++i)
        for (std::int64_t j = 0; j < width; ++j)
            narrow((widen(core[i * n + j]) - means[j]) * factor, result[i * n + j]);
}

}  // namespace

void etf_project(Elements core, std::int64_t batch, std::int64_t K, std::int64_t n, void* result,
                 int threads) {
    with_type(core.dtype, [&](auto type) {
        using T = decltype(type);
        std::int64_t width = panel_bytes / (K * static_cast<std::int64_t>(sizeof(T))) / min_width * min_width;
        width = width > max_width ? max_width : width < min_width ? min_width : width;
        const std::int64_t panels = (n + width - 1) / width;
        parallel_for(batch * panels, threads_for(batch * K * n, threads), [&](std::int64_t i) {
            const std::int64_t column = i % panels * width;
            const std::int64_t offset = i / panels * K * n + column;
            project_panel(static_cast<const T*>(core.data) + offset, K, n,
                          n - column < width ? n - column : width, static_cast<T*>(result) + offset);
        });
    });
}

}  // namespace dirmerge::DIRMERGE_ISA
