// Products with codes in plain C++, for all layouts except WORDS.
//
// Reads the layouts of matrix.hpp byte by byte, and is the shortest description of them. Sums of a chunk are int32 and
// exact; the chunks of a row are added in fp32 in increasing order, by the same operations as with other instructions.

inline void code_rows(const ProductJob& job, int64_t block, int64_t token) {
    const Matrix& m = job.m;
    const uint8_t* data = m.data.data() + m.first_byte[size_t(block)];
    const bool windows = m.layout == WINDOWS;
    const uint8_t* move = windows ? m.moves.data() + m.first_move[size_t(block)] : nullptr;
    const int16_t* q = job.q.q_of(token);
    float total[ROWS] = {};
    for (int64_t c = 0; c < m.chunks(); ++c) {
        int32_t sum[ROWS] = {};
        const auto add = [&](int64_t row, int64_t column, int code) { sum[row] += code * q[column]; };
        if (windows) {
            int64_t at = c * m.chunk;
            for (int step = 0; step < m.steps[size_t(block * m.chunks() + c)]; ++step, data += m.bits == 4 ? 32 : 48) {
                for (int window = 0; window < 2; ++window) {
                    at += *move++;
                    for (int i = 0; i < 16; ++i) {
                        const int64_t column = at + (window ? data[i] >> 4 : data[i] & 15);
                        const uint8_t byte = data[16 + window * 8 + i % 8 + (m.bits == 8 ? i / 8 * 16 : 0)];
                        add(i / 2, column, m.bits == 8 ? int8_t(byte) : nibble(byte, i >= 8));
                    }
                }
            }
        } else if (m.layout == PLACES) {
            for (int64_t first = c * m.chunk; first < m.chunk_end(c); first += WINDOW)
                for (int64_t slot = 0; slot < m.slots; slot += 4, data += 16 + 4 * m.bits)
                    for (int i = 0; i < 32; ++i) {  // code i % 2 of row i / 2 % 8, and two codes later
                        const uint8_t place = data[i / 16 * 8 + i % 8];
                        const uint8_t byte = data[16 + (m.bits == 8 ? i : i % 16)];
                        add(i / 2 % 8, first + (i % 16 >= 8 ? place >> 4 : place & 15),
                            m.bits == 8 ? int8_t(byte) : nibble(byte, i >= 16));
                    }
        } else if (m.bits == 4) {
            for (int64_t column = c * m.chunk; column < m.chunk_end(c); column += 8, data += 32)
                for (int i = 0; i < 64; ++i) {  // word i / 4, nibble i % 4
                    const uint8_t byte = data[i / 2];
                    add(i / 8, column + i % 4 * 2 + i / 4 % 2, (i % 2 ? byte >> 4 : byte & 15) - 8);
                }
        } else {
            for (int64_t column = c * m.chunk; column < m.chunk_end(c); column += 2, data += 16)
                for (int i = 0; i < 16; ++i) add(i / 2, column + i % 2, int8_t(data[i]));
        }
        const uint16_t* scales = m.scales.data() + (block * m.chunks() + c) * ROWS;
        for (int row = 0; row < 8; ++row)
            total[row] += float(sum[row]) * (pst::widen(scales[row]) * job.q.scales_of(token)[c]);
    }
    store_rows(total, m, block, job.y + token * job.y_width);
}

inline void code_product(const ProductJob& job) {
    for (int64_t token = 0; token < job.tokens; ++token)
        for (int64_t block = job.first; block < job.last; ++block) code_rows(job, block, token);
}

constexpr decltype(Functions::quantize_to_bytes) quantize_to_bytes = nullptr;
