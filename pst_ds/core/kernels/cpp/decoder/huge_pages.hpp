// Constant arrays in pages of 2 MB, if the system has them. A processor reads weights from memory faster this way: its
// prefetchers stop at the end of a page, and it caches the addresses of few pages.
//
// Arrays are placed one after another, each at a multiple of 64 bytes, in regions of at least 32 MB aligned to a page.
// All arrays of a region share its ownership; it is freed with the last of them. A lock protects the search for a
// place; arrays are constant once made, so reading needs none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pst {

// Bytes that follow those of the last call, in a region that is freed with the last of its arrays.
inline std::shared_ptr<uint8_t> huge_page_bytes(size_t bytes) {
    constexpr size_t PAGE = size_t(2) << 20;
    constexpr size_t REGION = 16 * PAGE;
    static std::mutex mutex;
    static std::weak_ptr<uint8_t> last;
    static size_t used;
    static size_t size;
    std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<uint8_t> region = last.lock();
    if (!region || used + bytes > size) {
        used = 0;
        size = (std::max(bytes, REGION) + PAGE - 1) / PAGE * PAGE;
        region.reset(static_cast<uint8_t*>(std::aligned_alloc(PAGE, size)), std::free);
        if (!region) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(region.get(), size, MADV_HUGEPAGE);
#endif
        last = region;
    }
    uint8_t* const at = region.get() + used;
    used += (bytes + 63) / 64 * 64;
    return {std::move(region), at};
}

template <class T> class InHugePages {
   public:
    InHugePages() = default;
    // padding: bytes that may be read past the end
    InHugePages(const std::vector<T>& from, size_t padding)
        : bytes_(huge_page_bytes(from.size() * sizeof(T) + padding)), size_(from.size()) {
        if (size_) std::memcpy(bytes_.get(), from.data(), size_ * sizeof(T));
    }
    // values are not initialised
    InHugePages(size_t size, size_t padding) : bytes_(huge_page_bytes(size * sizeof(T) + padding)), size_(size) {}
    T* writable() { return reinterpret_cast<T*>(bytes_.get()); }
    const T* data() const { return reinterpret_cast<const T*>(bytes_.get()); }
    size_t size() const { return size_; }

   private:
    std::shared_ptr<uint8_t> bytes_;
    size_t size_ = 0;
};

}  // namespace pst
