// Attention of the heads that share one key-value head: a key or value is widened once for HEADS of them. Included once
// per instruction set, before glue.hpp.
//
// Layout, all fp32 in the thread's room (attention_room) except the cache
//   query   (HEADS, padded), multiplied by the scale and padded with zeros
//   scores  (HEADS, places): `places` is the number of positions, rounded up to 16
//   keys, values  (positions, padded) of the cache, int8, bf16 or fp32; `padded` is a multiple of 16, with zeros at the end
//   sums    (HEADS, padded)
// A sum over a head's numbers is over whole vectors, since the padding is zero. A head's result has the same bits for
// every HEADS, and does not depend on the other sequences of a pass. The scales of an int8 cache multiply scores and
// weights, instead of every number of a row.

inline Floats widen(const float* from) { return load(from); }  // in addition to bf16 and int8

// scores (HEADS, places) = query (HEADS, padded) keys', four keys per step; scores after the last key are undefined.
// Caches of several sequences come from memory: later keys and the values, which are needed next, are prefetched.
template <class T, int HEADS>
inline void scores_of(const float* query, const T* keys, const T* values, int64_t count, int64_t padded, float* scores, int64_t places) {
    constexpr int64_t AHEAD = 64;             // keys to prefetch ahead
    constexpr int64_t LINE = 64 / sizeof(T);  // numbers in a cache line
    for (int64_t t = 0; t < count; t += 4) {
        for (int64_t i = t * padded; i < (t + 4) * padded; i += LINE) {
            if (t + AHEAD < count) __builtin_prefetch(keys + AHEAD * padded + i, 0, 2);
            __builtin_prefetch(values + i, 0, 2);
        }
        const T* key[4];
        for (int k = 0; k < 4; ++k) key[k] = keys + std::min(t + k, count - 1) * padded;
        Floats sum[HEADS][4] = {};
        for (int64_t i = 0; i < padded; i += LANES) {
            Floats wide[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) wide[k] = widen(key[k] + i);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; ++h) {
                const Floats of_head = load(query + h * padded + i);
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) sum[h][k] = fused(wide[k], of_head, sum[h][k]);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h) store_sums(sum[h], scores + h * places + t);
    }
}

// Replace scores by e^(score - largest), soft-capped if there is a cap, and return their sum. Places from `count` on
// become so small that they do not change it.
inline float exponentials(float* scores, int64_t count, int64_t places, float cap) {
    for (int64_t t = count; t < places; ++t) scores[t] = -3.0e38f;
    Floats largest = all(-3.0e38f);
    Floats total{};
    for (int64_t t = 0; t < places; t += LANES) {
        Floats value = load(scores + t);
        if (cap > 0) {
            value = cap * hyperbolic_tangent(value / cap);
            store(scores + t, value);
        }
        largest = larger(largest, value);
    }
    if (cap > 0)
        for (int64_t t = count; t < places; ++t) scores[t] = -3.0e38f;
    const Floats top = all(largest_of(largest));
    for (int64_t t = 0; t < places; t += LANES) {
        const Floats value = exponential(load(scores + t) - top);
        total += value;
        store(scores + t, value);
    }
    return sum_of(total);
}

// VECTORS * LANES columns of weighted_sums.
template <class T, int HEADS, int VECTORS>
inline void weighted(const float* weights, int64_t places, const float* scales, const T* values, int64_t count, int64_t padded, float* y) {
    Floats sum[HEADS][VECTORS] = {};
    for (int64_t t = 0; t < count; ++t) {
        Floats wide[VECTORS];
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) wide[i] = widen(values + t * padded + i * LANES);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h) {
            const Floats weight = all(weights[h * places + t]);
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; ++i) sum[h][i] = fused(weight, wide[i], sum[h][i]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) store(y + h * padded + i * LANES, sum[h][i] * scales[h]);
}

// y (HEADS, padded) = weights (HEADS, places) values (count, padded), times a scale per head.
template <class T, int HEADS>
inline void weighted_sums(const float* weights, int64_t places, const float* scales, const T* values, int64_t count, int64_t padded, float* y) {
    int64_t i = 0;
    for (; i + 4 * LANES <= padded; i += 4 * LANES)
        weighted<T, HEADS, 4>(weights, places, scales, values + i, count, padded, y + i);
    for (; i < padded; i += LANES) weighted<T, HEADS, 1>(weights, places, scales, values + i, count, padded, y + i);
}

// softmax(scale q k', soft-capped) v of HEADS heads from `first` on.
template <class T, int HEADS> inline void attend_together(const AttentionJob& job, int64_t first) {
    const int64_t count = job.end - job.begin;
    const int64_t places = round_up(count, 16);
    const int64_t padded = job.padded;
    float* scores = job.room;
    float* query = scores + HEADS * places;
    float* sums = query + HEADS * padded;
    float inverse[HEADS];
    const T* keys = static_cast<const T*>(job.k) + job.begin * padded;
    const T* values = static_cast<const T*>(job.v) + job.begin * padded;
    for (int64_t h = 0; h < HEADS; ++h)
        for (int64_t i = 0; i < padded; ++i)
            query[h * padded + i] = i < job.head ? job.q[(first + h) * job.head + i] * job.scale : 0.0f;
    scores_of<T, HEADS>(query, keys, values, count, padded, scores, places);
    for (int64_t h = 0; h < HEADS; ++h) {
        float* of_head = scores + h * places;
        if (job.k_scales)
            for (int64_t j = 0; j < count; ++j) of_head[j] *= job.k_scales[job.begin + j];
        inverse[h] = 1.0f / exponentials(of_head, count, places, job.cap);
        if (job.v_scales)
            for (int64_t j = 0; j < count; ++j) of_head[j] *= job.v_scales[job.begin + j];
    }
    weighted_sums<T, HEADS>(scores, places, inverse, values, count, padded, sums);
    for (int64_t h = 0; h < HEADS; ++h)
        std::memcpy(job.y + (first + h) * job.head, sums + h * padded, size_t(job.head) * sizeof(float));
}

template <class T> inline void attend_in(const AttentionJob& job) {
    constexpr int64_t most = LANES == 16 ? HEADS_TOGETHER : 2;  // 8-lane instruction sets have half as many registers
    for (int64_t first = 0; first < job.heads; first += most) {
        switch (std::min(most, job.heads - first)) {
            case 1: attend_together<T, 1>(job, first); break;
            case 2: attend_together<T, 2>(job, first); break;
            case 3: attend_together<T, 3>(job, first); break;
            default: attend_together<T, HEADS_TOGETHER>(job, first);
        }
    }
}
inline void attend(const AttentionJob& job, int64_t bits) {
    if (bits == 8) return attend_in<int8_t>(job);
    if (bits == 16) return attend_in<bf16>(job);
    attend_in<float>(job);
}
