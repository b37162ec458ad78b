// softmax(scale q k' + mask) v, one head at a time. Included once per instruction set, after its lanes.
//
// Layout
//   q, k, v, y  rows of tokens in tensors of the runtime, fp32, in which heads lie side by side (Head); not aligned
//   keys        [dimension][padded keys], transposed copy of a head's keys, zeros from the last key on: a vector holds
//               consecutive keys, so scores need no sums over lanes
//   values      [key][dimension], copy of a head's values
//   scores      [QUERIES][padded keys]
// `padded` is a multiple of KEY_VECTORS * LANES. The copies are aligned to 64 bytes and belong to the thread that works on the
// head. Softmax is in fp32 and subtracts the largest score; sums are in increasing order of dimensions and keys, for one
// query as for QUERIES.

// A head of q, k, v or the result: rows of `head` floats, `stride` floats apart.
struct Head {
    float* first;
    int64_t stride;
    float* row(int64_t i) const { return first + i * stride; }
};

// Added to the scores of a head: rows of keys, `stride` apart (0 if queries share them). May be null.
struct Mask {
    const float* first;
    int64_t stride;
};

constexpr int QUERIES = 6;
constexpr int KEY_VECTORS = 2;

// scores[query][key] of ROWS queries. `keys`: key vectors, [dimension][key], `padded` apart.
template <int ROWS>
inline void scores_of(const Head& q, int64_t query, const float* keys, int64_t padded, int64_t head, float* scores) {
    for (int64_t key = 0; key < padded; key += KEY_VECTORS * LANES) {
        Floats sum[ROWS][KEY_VECTORS] = {};
        for (int64_t d = 0; d < head; ++d) {
            Floats k[KEY_VECTORS];
#pragma GCC unroll 8
            for (int c = 0; c < KEY_VECTORS; ++c) k[c] = load(keys + d * padded + key + c * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
                for (int c = 0; c < KEY_VECTORS; ++c) sum[r][c] += q.row(query + r)[d] * k[c];
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < KEY_VECTORS; ++c) store(scores + r * padded + key + c * LANES, sum[r][c]);
    }
}

// Replace scores by e^(scale score + mask - largest) and return the inverse of their sum. Places from `keys` on become
// 0.
inline float softmax_row(float* scores, int64_t keys, int64_t padded, float scale, const float* mask) {
    const float least = -3.0e38f;
    Floats largest = all(least);
    for (int64_t i = 0; i < padded; i += LANES) {
        Floats value = load(scores + i) * scale;
        if (i + LANES <= keys) {
            if (mask) value += load(mask + i);
        } else
            for (int j = 0; j < LANES; ++j) value[j] = i + j < keys ? value[j] + (mask ? mask[i + j] : 0.0f) : least;
        value = larger(value, all(least));
        largest = larger(largest, value);
        store(scores + i, value);
    }
    const Floats top = all(largest_of(largest));
    Floats total{};
    for (int64_t i = 0; i < padded; i += LANES) {
        Floats value = exponential(load(scores + i) - top);
        if (i + LANES > keys)
            for (int j = 0; j < LANES; ++j) value[j] = i + j < keys ? value[j] : 0.0f;
        total += value;
        store(scores + i, value);
    }
    return 1.0f / sum_of(total);
}

// out[query][d] = share * sum over keys of scores[query][key] v[key][d], for ROWS queries and VECTORS vectors from d on.
template <int ROWS, int VECTORS>
inline void values_of(const float* scores, int64_t padded, int64_t keys, const Head& v, int64_t d, const float* share,
                      const Head& out, int64_t query) {
    Floats sum[ROWS][VECTORS] = {};
    for (int64_t key = 0; key < keys; ++key) {
        Floats value[VECTORS];
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; ++c) value[c] = load(v.row(key) + d + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < VECTORS; ++c) sum[r][c] += scores[r * padded + key] * value[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; ++c) store(out.row(query + r) + d + c * LANES, sum[r][c] * share[r]);
}

template <int ROWS>
inline void queries(const Head& q, const Head& v, const float* keys, int64_t count, int64_t padded, int64_t head,
                    int64_t query, float scale, const Mask& mask, float* scores, const Head& out) {
    float share[ROWS];
    scores_of<ROWS>(q, query, keys, padded, head, scores);
    for (int r = 0; r < ROWS; ++r)
        share[r] = softmax_row(scores + r * padded, count, padded, scale, mask.first ? mask.first + (query + r) * mask.stride : nullptr);
    int64_t d = 0;
    for (; d + 2 * LANES <= head; d += 2 * LANES) values_of<ROWS, 2>(scores, padded, count, v, d, share, out, query);
    for (; d + LANES <= head; d += LANES) values_of<ROWS, 1>(scores, padded, count, v, d, share, out, query);
    for (; d < head; ++d)
        for (int r = 0; r < ROWS; ++r) {
            float sum = 0;
            for (int64_t key = 0; key < count; ++key) sum += scores[r * padded + key] * v.row(key)[d];
            out.row(query + r)[d] = sum * share[r];
        }
}

// keys[dimension][key] from rows of keys, zeros from `count` on.
inline void transpose_keys(const Head& k, int64_t count, int64_t padded, int64_t head, float* keys) {
    const int64_t whole = head / LANES * LANES;
    for (int64_t key = 0; key < padded; key += LANES) {
        for (int64_t d = 0; d < whole; d += LANES) {
            Floats square[LANES];
            for (int i = 0; i < LANES; ++i) square[i] = key + i < count ? load(k.row(key + i) + d) : Floats{};
            transpose(square);
            for (int i = 0; i < LANES; ++i) store(keys + (d + i) * padded + key, square[i]);
        }
        for (int64_t d = whole; d < head; ++d)
            for (int i = 0; i < LANES; ++i) keys[d * padded + key + i] = key + i < count ? k.row(key + i)[d] : 0.0f;
    }
}

// One head of `num_queries` and `num_keys` with `head` dimensions. False if memory is short.
inline bool attend(const Head& q, const Head& k, const Head& v, int64_t num_queries, int64_t num_keys, int64_t head,
                   float scale, const Mask& mask, const Head& out) {
    static thread_local Scratch key_memory;
    static thread_local Scratch value_memory;
    static thread_local Scratch score_memory;
    const int64_t padded = round_up(num_keys, KEY_VECTORS * LANES);
    float* keys = key_memory.get<float>(padded * head);
    float* values = value_memory.get<float>(num_keys * head);
    float* scores = score_memory.get<float>(padded * QUERIES);
    if (!keys || !values || !scores) return false;
    transpose_keys(k, num_keys, padded, head, keys);
    for (int64_t key = 0; key < num_keys; ++key)  // adjacent, because distant rows would share few cache sets
        std::memcpy(values + key * head, v.row(key), size_t(head) * sizeof(float));
    const Head packed{values, head};
    int64_t query = 0;
    for (; query + QUERIES <= num_queries; query += QUERIES)
        queries<QUERIES>(q, packed, keys, num_keys, padded, head, query, scale, mask, scores, out);
    for (; query < num_queries; ++query) queries<1>(q, packed, keys, num_keys, padded, head, query, scale, mask, scores, out);
    return true;
}

// All heads of all sequences, each by attend_one. False if memory is short.
template <class Parallel> bool each_head(const AttentionCall& job, const Parallel& parallel, decltype(attend)* attend_one) {
    std::atomic<bool> done{true};
    parallel(job.batch * job.heads, [&](int64_t piece) {
        const int64_t b = piece / job.heads;
        const int64_t h = piece % job.heads;
        const int64_t shared = h * job.key_value_heads / job.heads;
        const Head q{const_cast<float*>(job.q) + b * job.queries * job.q_width + h * job.head, job.q_width};
        const Head k{const_cast<float*>(job.k) + b * job.keys * job.k_width + shared * job.head, job.k_width};
        const Head v{const_cast<float*>(job.v) + b * job.keys * job.v_width + shared * job.head, job.v_width};
        const Head y{job.y + b * job.queries * job.y_width + h * job.head, job.y_width};
        const Mask mask{job.mask ? job.mask + b * job.mask_batch + h * job.mask_head : nullptr, job.mask_query};
        if (!attend_one(q, k, v, job.queries, job.keys, job.head, job.scale, mask, y)) done.store(false);
    });
    return done.load();
}

template <class Parallel> bool attention(const AttentionCall& job, const Parallel& parallel) { return each_head(job, parallel, attend); }
