// The C kernel of the range map beside std::map in one process: `ordered_map N` prints nanoseconds per operation as JSON.
// Each figure is the best of several passes, taken in turns.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

extern "C" {
#include "rangemap.h"
}

using Clock = std::chrono::steady_clock;

static volatile uint64_t sink;

// CPU time of this thread: what others do with the processor does not count.
static double cpu_ns()
{
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

template <class F> static double ns(size_t n, F &&run)
{
    double start = cpu_ns();
    run();
    return (cpu_ns() - start) / n;
}

struct Figure {
    double best = 1e18;
    void note(double value) { best = std::min(best, value); }
};

struct Region {
    uint64_t last, value;
};

int main(int argc, char **argv)
{
    size_t n = argc > 1 ? strtoull(argv[1], nullptr, 0) : 65536, lookups = std::max<size_t>(n, 1 << 18);
    size_t passes = n > 500000 ? 2 : 5;
    std::mt19937_64 rng(1);
    std::vector<rangemap_entry> sorted(n);
    uint64_t at = 0;
    for (auto &entry : sorted) {        // 1 to 14 pages, with gaps: 7.5 pages an entry
        uint64_t pages = 1 + rng() % 14;
        at += rng() % 4;
        entry = {at << 12, ((at + pages) << 12) - 1, rng() << 12};
        at += pages;
    }
    std::vector<rangemap_entry> shuffled = sorted;
    std::shuffle(shuffled.begin(), shuffled.end(), rng);
    std::vector<uint64_t> keys(lookups), pages(lookups), out(lookups);
    for (auto &key : keys) {
        const auto &entry = sorted[rng() % n];
        key = entry.start + rng() % (entry.last - entry.start + 1);
    }
    for (size_t i = 0; i < lookups; i++)
        pages[i] = (i % at) << 12;

    Figure insert, insert_std, remove, remove_std, find, find_std, many, sequential, build, ascending, ascending_std;
    double bytes = 0;
    for (size_t pass = 0; pass < passes; pass++) {
        rangemap *map = rangemap_new();
        std::map<uint64_t, Region> peer;
        insert.note(ns(n, [&] { for (auto &e : shuffled) rangemap_insert(map, e.start, e.last, e.value); }));
        insert_std.note(ns(n, [&] {
            for (auto &e : shuffled) {
                auto next = peer.lower_bound(e.start);
                if (next != peer.end() && next->first <= e.last)
                    continue;
                if (next != peer.begin() && std::prev(next)->second.last >= e.start)
                    continue;
                peer.emplace_hint(next, e.start, Region{e.last, e.value});
            }
        }));
        bytes = double(rangemap_memory(map)) / n;
        uint64_t sum = 0;
        find.note(ns(lookups, [&] {
            rangemap_entry e;
            for (auto key : keys)
                if (rangemap_find(map, key, &e))
                    sum += e.value + key - e.start;
        }));
        find_std.note(ns(lookups, [&] {
            for (auto key : keys) {
                auto next = peer.upper_bound(key);
                if (next != peer.begin() && (--next)->second.last >= key)
                    sum -= next->second.value + key - next->first;
            }
        }));
        if (sum)
            return fprintf(stderr, "the maps differ\n"), 1;
        many.note(ns(lookups, [&] { sink = rangemap_find_many(map, keys.data(), out.data(), lookups, ~0ull); }));
        sequential.note(ns(lookups, [&] { sink = rangemap_find_many(map, pages.data(), out.data(), lookups, ~0ull); }));
        remove.note(ns(n, [&] { for (auto &e : shuffled) rangemap_remove(map, e.start, nullptr); }));
        remove_std.note(ns(n, [&] { for (auto &e : shuffled) peer.erase(e.start); }));
        ascending_std.note(ns(n, [&] { for (auto &e : sorted) peer.emplace_hint(peer.end(), e.start, Region{e.last, e.value}); }));
        ascending.note(ns(n, [&] { for (auto &e : sorted) rangemap_insert(map, e.start, e.last, e.value); }));
        rangemap_clear(map);
        build.note(ns(n, [&] { rangemap_build(map, sorted.data(), n); }));
        rangemap_free(map);
    }

    // Look-ups beside 200,000 changes a second: how long they take, and the longest of them.
    rangemap *map = rangemap_new();
    rangemap_build(map, sorted.data(), n);
    std::atomic<bool> stop{false};
    std::thread writer([&] {
        auto due = Clock::now();
        for (size_t i = 0; !stop; i = (i + 1) % n) {
            rangemap_remove(map, shuffled[i].start, nullptr);
            rangemap_insert(map, shuffled[i].start, shuffled[i].last, shuffled[i].value);
            due += std::chrono::microseconds(10);
            while (!stop && Clock::now() < due)
                ;
        }
    });
    std::vector<double> beside;
    double alone = find.best;
    size_t wrong = 0;
    double longest = 0;
    for (size_t i = 0; i < 1 << 18; i++) {
        rangemap_entry e;
        double before = cpu_ns();
        rangemap_find(map, keys[i], &e);
        longest = std::max(longest, (cpu_ns() - before) / 1000);
    }
    for (int pass = 0; pass < 20; pass++)
        beside.push_back(ns(1 << 16, [&] {
            rangemap_entry e;
            for (size_t i = 0; i < 1 << 16; i++)
                wrong += rangemap_find(map, keys[i], &e) && (e.start > keys[i] || e.last < keys[i]);
        }));
    stop = true;
    writer.join();
    rangemap_free(map);
    std::sort(beside.begin(), beside.end());

    printf("{\"n\": %zu, \"insert\": %.1f, \"insert_std\": %.1f, \"remove\": %.1f, \"remove_std\": %.1f, "
           "\"find\": %.1f, \"find_std\": %.1f, \"find_many\": %.2f, \"find_many_sequential\": %.2f, \"build\": %.2f, "
           "\"ascending\": %.1f, \"ascending_std\": %.1f, \"bytes\": %.1f, "
           "\"find_alone\": %.1f, \"find_beside_writer\": %.1f, \"longest_us\": %.1f, \"wrong\": %zu}\n",
           n, insert.best, insert_std.best, remove.best, remove_std.best, find.best, find_std.best, many.best, sequential.best,
           build.best, ascending.best, ascending_std.best, bytes, alone, beside[beside.size() / 2], longest,
           wrong);
    return wrong != 0;
}
