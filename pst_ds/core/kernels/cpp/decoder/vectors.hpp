// Products with codes of any number of vectors, by rows_of<BITS, TOKENS>(job, block, token), which multiplies a block of 8
// rows with 1, 2 or 4 vectors. Included after the file of an instruction set that defines it, in its namespace.

// Vectors are processed in tiles whose integers stay in the first-level cache.
template <int BITS> inline void code_product_of(const ProductJob& job) {
    const int64_t tile = std::max<int64_t>(8, 24576 / (2 * job.q.stride) / 4 * 4);
    for (int64_t from = 0; from < job.tokens; from += tile) {
        const int64_t to = std::min(job.tokens, from + tile);
        for (int64_t block = job.first; block < job.last; ++block) {
            int64_t token = from;
            for (; token + 4 <= to; token += 4) rows_of<BITS, 4>(job, block, token);
            for (; token + 2 <= to; token += 2) rows_of<BITS, 2>(job, block, token);
            for (; token < to; ++token) rows_of<BITS, 1>(job, block, token);
        }
    }
}

inline void code_product(const ProductJob& job) {
    if (job.m.bits == 4) return code_product_of<4>(job);
    code_product_of<8>(job);
}

constexpr decltype(Functions::quantize_to_bytes) quantize_to_bytes = nullptr;
