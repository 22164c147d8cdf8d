// Loops over several threads, and scratch memory.
//
// Plain std::thread rather than OpenMP: torch ships an OpenMP runtime of its own, and a second one beside it
// would keep its idle threads spinning on the cores that torch computes on. Threads are started per call,
// which costs tens of microseconds: callers ask for one thread per `grain` of work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace dirmerge {

// A reference to a callable void(index), valid as long as the callable lives.
class Task {
  public:
    template <typename Body>
    Task(const Body& body)  // NOLINT: converts from a lambda
        : body_(&body),
          call_([](const void* self, std::int64_t i) { (*static_cast<const Body*>(self))(i); }) {}
    void operator()(std::int64_t i) const { call_(body_, i); }

  private:
    const void* body_;
    void (*call_)(const void*, std::int64_t);
};

// Runs task(0) … task(count − 1), each once, in any order, on up to `threads` threads. The task must not
// throw.
void parallel_for(std::int64_t count, int threads, Task task);

// The number of threads worth starting for `work` elements.
int threads_for(std::int64_t work, int threads);

// Uninitialised memory of the caller's; throws std::bad_alloc.
class Scratch {
  public:
    explicit Scratch(std::size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* data() const { return data_; }

  private:
    void* data_;
};

}  // namespace dirmerge
