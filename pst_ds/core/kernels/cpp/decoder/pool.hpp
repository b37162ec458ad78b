// Threads that help a leading thread without anybody waiting for a thread that has no work in progress. On a shared
// processor a descheduled thread only costs its help; any thread may take a piece of work.
//
// One thread leads: it calls wake, run and rest. `call`, `context` and `done` describe the current work; the leader writes
// them before it stores the ticket (release), and a helper reads them after it has taken a piece with the ticket
// (acquire). The leader returns from run when as many pieces are done as there are, so `context` may lie on its stack. A
// helper that still holds an old ticket cannot take a piece: the stage, 24 bits of the ticket, has changed.
// Between passes helpers spin for a moment, then sleep on `wakes`.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace pst {

class Pool {
  public:
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            is_ending = true;
            is_awake.store(false);
        }
        wakes.notify_all();
        for (std::thread& thread : helpers) thread.join();
    }

    int threads() const { return int(helpers.size()) + 1; }
    // Use `threads` in total, including the leading one.
    void grow(int threads) {
        while (this->threads() < threads) helpers.emplace_back(&Pool::help, this, int(helpers.size()) + 1);
    }

    // Threads that may help until rest() is called: the first ones.
    void wake(int threads) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            allowed = threads;
            is_awake.store(threads > 1);
        }
        if (threads > 1) wakes.notify_all();
    }
    void rest() { is_awake.store(false); }

    // Call work(i, thread) for i in 0 .. count, each once; returns when all are done. count is below 2^20.
    template <class Work> void run(int64_t count, const Work& work) {
        if (count == 1 || !is_awake.load(std::memory_order_relaxed)) {
            for (int64_t i = 0; i < count; ++i) work(i, 0);
            return;
        }
        call = [](const void* state, int64_t i, int thread) { (*static_cast<const Work*>(state))(i, thread); };
        context = &work;
        done.store(0, std::memory_order_relaxed);
        stage = (stage + 1) & 0xffffff;
        ticket.store(uint64_t(stage) << 40 | uint64_t(count) << 20, std::memory_order_release);
        while (take(0)) {}
        for (int turns = 0; done.load(std::memory_order_acquire) < count; ++turns) pause(turns);
    }

  private:
    // Take a piece of work and do it; false if none is left. The ticket holds the number of pieces and of those taken,
    // so a piece that was taken belongs to the work that is still described.
    bool take(int thread) {
        uint64_t now = ticket.load(std::memory_order_acquire);
        do {
            if ((now & 0xfffff) >= (now >> 20 & 0xfffff)) return false;
        } while (!ticket.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel, std::memory_order_acquire));
        call(context, int64_t(now & 0xfffff), thread);
        done.fetch_add(1, std::memory_order_release);
        return true;
    }

    static void pause(int turns) {
        if (turns % 1024 == 1023) return std::this_thread::yield();
#if defined(__x86_64__) && defined(__GNUC__)
        _mm_pause();
#endif
    }

    void help(int thread) {
        for (;;) {
            for (int turns = 0; is_awake.load(std::memory_order_relaxed) && thread < allowed.load(); ++turns)
                if (take(thread)) turns = 0;
                else pause(turns);
            // the next token usually arrives at once
            for (int turns = 0; turns < 4000 && !is_awake.load(std::memory_order_relaxed); ++turns) pause(turns);
            std::unique_lock<std::mutex> lock(mutex);
            if (is_ending) return;
            wakes.wait(lock, [&] { return is_ending || (is_awake.load() && thread < allowed.load()); });
            if (is_ending) return;
        }
    }

    std::vector<std::thread> helpers;
    std::mutex mutex;
    std::condition_variable wakes;
    bool is_ending = false;
    std::atomic<bool> is_awake{false};
    std::atomic<int> allowed{1};
    std::atomic<uint64_t> ticket{0};  // 24 bits of the stage, 20 of the number of pieces, 20 of the pieces taken
    std::atomic<int64_t> done{0};
    uint32_t stage = 0;
    void (*call)(const void*, int64_t, int) = nullptr;
    const void* context = nullptr;
};

}  // namespace pst
