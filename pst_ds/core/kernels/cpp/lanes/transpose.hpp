// A square of vectors is transposed lane by lane, for instruction sets without shuffles of our own.

inline void transpose(Floats (&square)[LANES]) {
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < i; ++j) {
            const float other = square[i][j];
            square[i][j] = square[j][i];
            square[j][i] = other;
        }
}
