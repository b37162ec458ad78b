// Layer normalisation, optionally of the sum of two tensors. Included once per instruction set.
//
// All arrays are rows of `width` floats of the runtime, at any address. The variance is the mean of (x - mean)^2, in a
// second pass over the row, since E[x^2] - mean^2 would lose digits in fp32. Whole vectors come first; the last
// numbers, fewer than LANES, are added separately, so nothing is read past a row's end.

// y = normalized (x + skip) * gain + shift of one row; `sum` (or null) gets x + skip. skip and shift may be null.
inline void layer_norm(const float* x, const float* skip, const float* gain, const float* shift, float epsilon,
                       int64_t width, float* y, float* sum) {
    const int64_t whole = width / LANES * LANES;
    Floats total{};
    float rest = 0;
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats value = skip ? load(x + i) + load(skip + i) : load(x + i);
        store(y + i, value);
        total += value;
    }
    for (int64_t i = whole; i < width; ++i) {
        y[i] = skip ? x[i] + skip[i] : x[i];
        rest += y[i];
    }
    if (sum) std::memcpy(sum, y, size_t(width) * sizeof(float));
    const float mean = (sum_of(total) + rest) / float(width);
    total = Floats{};
    rest = 0;
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats away = load(y + i) - mean;
        total += away * away;
    }
    for (int64_t i = whole; i < width; ++i) rest += (y[i] - mean) * (y[i] - mean);
    const float scale = 1.0f / std::sqrt((sum_of(total) + rest) / float(width) + epsilon);
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats value = (load(y + i) - mean) * scale * load(gain + i);
        store(y + i, shift ? value + load(shift + i) : value);
    }
    for (int64_t i = whole; i < width; ++i) y[i] = (y[i] - mean) * scale * gain[i] + (shift ? shift[i] : 0.0f);
}
