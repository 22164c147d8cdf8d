// The table of one copy of the kernels: compiled once per instruction set, as they are.
#include "cpu/kernels.h"

#define DIRMERGE_STRING_(x) #x
#define DIRMERGE_STRING(x) DIRMERGE_STRING_(x)

namespace dirmerge::DIRMERGE_ISA {

void delta(Elements, Elements, void*, std::int64_t, double*, std::int64_t*, int);
void delta_add(const Elements*, const Elements*, const double*, std::int64_t, bool, Elements, std::int64_t,
               std::int64_t*, int);
void delta_kth_magnitude(const Elements*, const Elements*, std::int64_t, bool, std::int64_t, std::int64_t,
                         void*, std::int64_t*, int);
void delta_elect_add(const Elements*, const Elements*, const void*, const double*, std::int64_t, bool, double,
                     Elements, std::int64_t, std::int64_t*, int);
void kth_largest_magnitude(Elements, std::int64_t, std::int64_t, std::int64_t, std::int64_t, void*, int);
void elect_merge(Elements, std::int64_t, std::int64_t, std::int64_t, const void*, const void*, void*, int);
void lowrank_add(Matrix, Matrix, float, Matrix, int);

extern const Kernels kernels;
const Kernels kernels = {
    DIRMERGE_STRING(DIRMERGE_ISA), delta,       delta_add,   delta_kth_magnitude, delta_elect_add,
    kth_largest_magnitude,         elect_merge, lowrank_add,
};

}  // namespace dirmerge::DIRMERGE_ISA
