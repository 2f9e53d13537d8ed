// Work shared out over threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

constexpr int64_t ELEMENTS_PER_THREAD = 1 << 17, ELEMENTS_PER_PIECE = 1 << 18;

// Calls work(k, pieces) for k = 0 … pieces - 1, on as many threads as given, or fewer for few elements or where the system has
// none left. Who is done with a piece takes the next, so that nobody waits long for a processor that is slow at the moment.
template <class Work>
static void shared_out(int64_t elements, int threads, Work work) {
    int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, elements / ELEMENTS_PER_THREAD));
    int64_t pieces = workers == 1 ? 1 : std::max(workers, elements / ELEMENTS_PER_PIECE);
    std::atomic<int64_t> next{0};
    auto take = [&] {
        for (int64_t k; (k = next++) < pieces;) work(k, pieces);
    };
    std::vector<std::thread> others;
    try {
        while (int64_t(others.size()) + 1 < workers) others.emplace_back(take);
    } catch (const std::system_error&) {
    }
    take();
    for (auto& other : others) other.join();
}
