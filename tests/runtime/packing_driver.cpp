// Random codes packed to every layout, compared byte by byte with definitions that are written for reading.
//   driver CASES SEED     prints how many were wrong
#include <cstdio>
#include <random>

#include "../../pst_ds/core/kernels/cpp/decoder/packing/pack.hpp"

namespace {

std::mt19937 generator;
int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

template <class T, class U> bool same(const T& expected, const U& got) {
    return expected.size() == got.size() && (expected.empty() || !std::memcmp(expected.data(), got.data(), got.size() * sizeof(*got.data())));
}

// The arrays of a matrix besides scales, as packing appends to them.
struct Expected {
    const pst::Matrix& m;
    const std::vector<int8_t>& codes;
    std::vector<uint8_t> data;
    std::vector<uint8_t> moves;
    std::vector<int64_t> first_byte;
    std::vector<int64_t> first_move;
    std::vector<uint16_t> steps;
    std::vector<uint64_t> masks;
    std::vector<int32_t> list_vectors;

    int at(int64_t row, int64_t column) const {
        return row < m.rows && column < m.columns ? codes[size_t(row * m.columns + column)] : 0;
    }
    static uint8_t two(int low, int high) { return uint8_t((low & 15) | (high & 15) << 4); }

    void pack_words(int64_t block) {
        const int64_t first = block * 16;
        list_vectors.push_back(0);
        for (int64_t column = 0; m.has_bits && column < m.columns; column += 64) {
            int most = 0;
            for (int64_t row = first; row < first + 16; ++row) {
                int kept = 0;
                for (int64_t i = column; i < column + 64; ++i) kept += at(row, i) != 0;
                most = std::max(most, kept);
            }
            list_vectors.back() += (most + 3) / 4;
        }
        std::vector<int> held[2];
        for (int64_t column = 0; column < m.words() * m.word; column += 4) {
            std::vector<int>& codes_of_word = held[m.bits == 4 && column % 8];
            uint64_t mask = 0;
            for (int64_t i = 0; i < 64; ++i) {
                const int code = at(first + i / 4, column + i % 4);
                if (code) mask |= uint64_t(1) << i;
                if (code || !m.has_bits) codes_of_word.push_back(code);
            }
            if (m.has_bits) masks.push_back(mask);
            if (m.bits == 4 && column % 8 == 0) continue;
            const size_t count = std::max(held[0].size(), held[1].size());
            for (auto& of_word : held) of_word.resize(count);
            for (size_t i = 0; i < count; ++i) data.push_back(m.bits == 4 ? two(held[0][i] + 8, held[1][i] + 8) : uint8_t(held[0][i]));
            for (auto& of_word : held) of_word.clear();
        }
    }

    void pack_pairs(int64_t block) {
        for (int64_t column = 0; m.bits == 8 && column < (m.columns + 3) / 4 * 4; column += 2)
            for (int64_t row = block * 8; row < block * 8 + 8; ++row)
                for (int64_t i = column; i < column + 2; ++i) data.push_back(uint8_t(at(row, i)));
        for (int64_t column = 0; m.bits == 4 && column < (m.columns + 7) / 8 * 8; column += 8)
            for (int64_t row = block * 8; row < block * 8 + 8; ++row)
                for (int64_t i = column; i < column + 2; ++i) {
                    data.push_back(two(at(row, i) + 8, at(row, i + 2) + 8));
                    data.push_back(two(at(row, i + 4) + 8, at(row, i + 6) + 8));
                }
    }

    void pack_windows(int64_t block) {
        first_move.push_back(int64_t(moves.size()));
        for (int64_t c = 0; c < m.chunks(); ++c) {
            // the remaining columns of each row
            std::vector<std::vector<int64_t>> remaining(8);
            for (int64_t row = 0; row < 8; ++row)
                for (int64_t column = c * m.chunk; column < m.chunk_end(c); ++column)
                    if (at(block * 8 + row, column)) remaining[size_t(row)].push_back(column);
            std::vector<std::vector<int>> places;
            std::vector<std::vector<int>> values;
            for (int64_t place = c * m.chunk;;) {
                int64_t next = -1;
                for (const auto& columns : remaining)
                    if (!columns.empty() && (next < 0 || columns[0] < next)) next = columns[0];
                if (next < 0) break;
                const int64_t move = std::min<int64_t>(next - place, 255);
                moves.push_back(uint8_t(move));
                place += move;
                places.emplace_back(16);
                values.emplace_back(16);
                for (int64_t row = 0; row < 8; ++row)
                    for (int64_t i = 0; i < 2; ++i) {
                        auto& columns = remaining[size_t(row)];
                        if (columns.empty() || columns[0] >= place + 16) continue;
                        places.back()[size_t(2 * row + i)] = int(columns[0] - place);
                        values.back()[size_t(2 * row + i)] = at(block * 8 + row, columns[0]);
                        columns.erase(columns.begin());
                    }
            }
            if (places.size() % 2) {
                places.emplace_back(16);
                values.emplace_back(16);
                moves.push_back(0);
            }
            for (size_t w = 0; w < places.size(); w += 2) {
                for (size_t i = 0; i < 16; ++i) data.push_back(two(places[w][i], places[w + 1][i]));
                for (size_t half = 0; half < (m.bits == 4 ? 1 : 2); ++half)
                    for (size_t of = w; of < w + 2; ++of)
                        for (size_t i = 8 * half; i < 8 * half + 8; ++i)
                            data.push_back(m.bits == 4 ? two(values[of][i], values[of][i + 8]) : uint8_t(values[of][i]));
            }
            steps.push_back(uint16_t(places.size() / 2));
        }
    }

    // A step has the places of 4 codes of 8 rows, rows 4 to 7 in upper halves, and then the codes.
    void pack_places(int64_t block) {
        for (int64_t first = 0; first < m.columns; first += 16)
            for (int64_t slot = 0; slot < m.slots; slot += 4) {
                int places[8][4] = {};
                int values[8][4] = {};
                for (int64_t row = 0; row < 8; ++row) {
                    int64_t kept = 0;
                    for (int place = 0; place < 16; ++place) {
                        const int code = at(block * 8 + row, first + place);
                        if (!code) continue;
                        if (kept >= slot && kept < slot + 4) {
                            places[row][kept - slot] = place;
                            values[row][kept - slot] = code;
                        }
                        ++kept;
                    }
                }
                for (int pair = 0; pair < 4; pair += 2)
                    for (int row = 0; row < 4; ++row)
                        for (int i = pair; i < pair + 2; ++i) data.push_back(two(places[row][i], places[row + 4][i]));
                for (int pair = 0; pair < (m.bits == 4 ? 2 : 4); pair += 2)
                    for (int row = 0; row < 8; ++row)
                        for (int i = pair; i < pair + 2; ++i)
                            data.push_back(m.bits == 4 ? two(values[row][i], values[row][i + 2]) : uint8_t(values[row][i]));
            }
    }

    Expected(const pst::Matrix& matrix, const std::vector<int8_t>& from) : m(matrix), codes(from) {
        for (int64_t block = 0; block < m.blocks(); ++block) {
            first_byte.push_back(int64_t(data.size()));
            if (m.layout == pst::WORDS) pack_words(block);
            if (m.layout == pst::PAIRS) pack_pairs(block);
            if (m.layout == pst::PLACES) pack_places(block);
            if (m.layout == pst::WINDOWS) pack_windows(block);
        }
        first_byte.push_back(int64_t(data.size()));
        if (m.layout == pst::WINDOWS) first_move.push_back(int64_t(moves.size()));
    }

    bool is_packed() const {
        return same(data, m.data) && same(moves, m.moves) && same(first_byte, m.first_byte) && same(first_move, m.first_move) &&
               same(steps, m.steps) && same(masks, m.masks) && same(list_vectors, m.list_vectors);
    }
};

bool is_wrong() {
    const int64_t rows = between(1, 150), columns = between(1, between(0, 3) ? 300 : 4500), kept = between(0, 120);
    const int bits = between(0, 1) ? 8 : 4, largest = bits == 8 ? 127 : 7;
    const int64_t group = 32 * (between(0, 1) ? between(0, 4) : 0), groups = group ? (columns + group - 1) / group : 1;
    // codes at random places, or only in the first columns of every 16; none at all is a pattern too
    const bool has_pattern = between(0, 2) == 0;
    const int64_t columns_kept = between(0, 9);
    std::vector<int8_t> codes;
    for (int64_t i = 0; i < rows * columns; ++i) {
        const bool is_kept = has_pattern ? i % columns % 16 < columns_kept : between(1, 100) <= kept;
        codes.push_back(int8_t(is_kept ? between(-largest, largest) : 0));
    }
    std::vector<uint16_t> scales;
    for (int64_t i = 0; i < rows * groups; ++i) scales.push_back(uint16_t(between(0x3c00, 0x3d00)));
    const std::unique_ptr<pst::Matrix> matrix(
        pst::pack(codes.data(), scales.data(), rows, columns, bits, group, between(0, 1), int(between(1, 3))));
    // kernels take whole steps of 4 codes
    if (matrix->layout == pst::PLACES && matrix->slots != 4 && matrix->slots != 8) return true;
    return !Expected(*matrix, codes).is_packed();
}

}  // namespace

int main(int, char** arguments) {
    generator.seed(unsigned(std::atoi(arguments[2])));
    int wrong = 0;
    for (int i = 0; i < std::atoi(arguments[1]); ++i) wrong += is_wrong();
    std::printf("%d wrong\n", wrong);
}
