// Low-rank updates of users. V x is computed like scores of x with `rank` keys, and U (V x) like a weighted sum of as many
// values. A token's result does not depend on the tokens next to it. Included once per instruction set, after attention.hpp.
//
// Layout: V (rank, columns) and U' (rank, rows), fp32 or bf16, rows padded with zeros to a multiple of 16 numbers; they belong
// to the caller. In the thread's room (update_room), fp32: x (TOKENS, columns) if it needs padding, V x (TOKENS, places)
// and U V x (TOKENS, rows), each with its last dimension rounded up to 16.

template <class T, int TOKENS> inline void update_together(const UpdateJob& job, int64_t first) {
    const int64_t columns = round_up(job.columns, 16);
    const int64_t rows = round_up(job.rows, 16);
    const int64_t places = round_up(job.rank, 16);
    const float* x = job.x + first * job.columns;
    float* padded = job.room;
    float* inner = padded + TOKENS * columns;
    float* sums = inner + TOKENS * places;
    float betas[TOKENS];
    for (int t = 0; t < TOKENS; ++t) betas[t] = job.beta;
    for (int64_t t = 0; columns > job.columns && t < TOKENS; ++t)
        std::fill(std::copy_n(x + t * job.columns, job.columns, padded + t * columns), padded + (t + 1) * columns, 0.0f);
    if (columns > job.columns) x = padded;
    const T* v = static_cast<const T*>(job.v);
    const T* u = static_cast<const T*>(job.u);
    scores_of<T, TOKENS>(x, v, u, job.rank, columns, inner, places);
    weighted_sums<T, TOKENS>(inner, places, betas, u, job.rank, rows, sums);
    for (int64_t t = 0; t < TOKENS; ++t)
        for (int64_t i = 0; i < job.rows; ++i) job.y[(first + t) * job.y_width + i] += sums[t * rows + i];
}

template <class T> inline void update_in(const UpdateJob& job) {
    constexpr int most = LANES == 16 ? HEADS_TOGETHER : 2;
    int64_t token = 0;
    for (; token + most <= job.tokens; token += most) update_together<T, most>(job, token);
    for (; token < job.tokens; ++token) update_together<T, 1>(job, token);
}
inline void update(const UpdateJob& job, int64_t bits) { return bits == 16 ? update_in<bf16>(job) : update_in<float>(job); }
