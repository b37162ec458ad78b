// Blocks of a matrix are packed by several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace pst {

// Call work(block) for all blocks, each once; `piece`: blocks that a thread takes together. `work` must not throw, which
// would end the process in a thread.
template <class Work>
void in_parallel_blocks(int64_t blocks, int threads, const Work& work, int64_t piece = 8) {
    std::atomic<int64_t> next{0};
    const auto run = [&] {
        for (int64_t first = next.fetch_add(piece); first < blocks; first = next.fetch_add(piece))
            for (int64_t block = first; block < std::min(blocks, first + piece); ++block) work(block);
    };
    std::vector<std::thread> helpers;
    const int64_t most = std::min<int64_t>(threads, (blocks + piece - 1) / piece);
    helpers.reserve(size_t(std::max<int64_t>(most, 1)));
    try {
        while (int64_t(helpers.size()) + 1 < most) helpers.emplace_back(run);
    } catch (const std::system_error&) {
        // the system has no more threads: the existing ones do the work
    }
    run();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace pst
