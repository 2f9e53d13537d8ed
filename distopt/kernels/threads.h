// Work shared out over threads.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

constexpr int64_t ELEMENTS_PER_THREAD = 1 << 17;

// Calls work(k) for k = 0 … threads - 1, with fewer threads for few elements, each on one of its own; returns their number.
template <class Work>
static int64_t shared_out(int64_t elements, int threads, Work work) {
    int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, elements / ELEMENTS_PER_THREAD));
    std::vector<std::thread> others;
    for (int64_t k = 1; k < workers; ++k) others.emplace_back(work, k, workers);
    work(0, workers);
    for (auto& other : others) other.join();
    return workers;
}
