// Work shared out over threads.

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

constexpr int64_t ELEMENTS_PER_THREAD = 1 << 17;

// Calls work(k, workers) for k = 0 … workers - 1, on as many threads as given, or fewer for few elements; returns their number.
// What the system has no thread for is done here.
template <class Work>
static int64_t shared_out(int64_t elements, int threads, Work work) {
    int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, elements / ELEMENTS_PER_THREAD));
    std::vector<std::thread> others;
    int64_t started = 1;
    try {
        for (; started < workers; ++started) others.emplace_back(work, started, workers);
    } catch (const std::system_error&) {
    }
    work(0, workers);
    for (int64_t k = started; k < workers; ++k) work(k, workers);
    for (auto& other : others) other.join();
    return workers;
}
