// A strided array in memory that somebody else owns.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace dirmerge {

struct View {
    void* data;
    DType dtype;
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> strides;  // in elements
    bool is_writable;

    std::size_t dims() const { return shape.size(); }

    std::int64_t count() const {
        std::int64_t product = 1;
        for (const std::int64_t size : shape) product *= size;
        return product;
    }

    // Whether the dimensions from `first` on lie in memory without gaps, in order; without entries they do.
    bool is_contiguous(std::size_t first = 0) const {
        if (count() == 0) return true;
        std::int64_t expected = 1;
        for (std::size_t d = dims(); d-- > first;) {
            if (shape[d] != 1 && strides[d] != expected) return false;
            expected *= shape[d];
        }
        return true;
    }
};

}  // namespace dirmerge
