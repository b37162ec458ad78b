// Every instruction set of arm64 against the portable kernels, bit by bit.
//   driver CASES SEED     prints the sets that were compared, and how many results were wrong
#include <cstdio>
#include <memory>
#include <random>

#include "../../pst_ds/core/kernels/cpp/decoder/decoder.cpp"

namespace {

std::mt19937 generator;
int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
template <class T> T one_of(std::initializer_list<T> values) { return values.begin()[between(0, int64_t(values.size()) - 1)]; }
std::vector<float> normals(int64_t count) {
    std::vector<float> found(static_cast<size_t>(count));
    for (float& value : found) value = std::normal_distribution<float>()(generator);
    return found;
}
bool differ(const std::vector<float>& a, const std::vector<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) != 0;
}

// Codes and activations reach both ends of their ranges; one infinity makes a chunk's scale a NaN.
bool product_differs(int level) {
    const int64_t rows = between(1, 40), tokens = between(1, 9);
    const int64_t columns = one_of<int64_t>({between(1, 200), between(1, 700), 2048, between(2049, 4500)});
    const int bits = one_of({4, 8});
    const int64_t group = one_of<int64_t>({0, 32, 64, 96, 128}), groups = group ? (columns + group - 1) / group : 1;
    const int64_t kept = one_of<int64_t>({0, 5, 20, 40, 50, 60, 80, 100}), lowest = bits == 8 ? -127 : -8;
    const bool extreme = between(0, 3) == 0;
    std::vector<int8_t> codes;
    for (int64_t i = 0; i < rows * columns; ++i)
        codes.push_back(int8_t(between(1, 100) > kept ? 0 : extreme ? lowest : between(lowest, -1 - lowest)));
    std::vector<uint16_t> scales;
    for (int64_t i = 0; i < rows * groups; ++i) scales.push_back(uint16_t(between(0x3c00, 0x3d00)));
    std::vector<float> x = normals(tokens * columns);
    if (extreme)
        for (float& value : x) value = value < 0 && between(0, 1) ? -1.0f : 1.0f;
    if (between(0, 9) == 0) x[size_t(between(0, tokens * columns - 1))] = INFINITY;
    const std::unique_ptr<pst::Matrix> matrix(pst::pack(codes.data(), scales.data(), rows, columns, bits, group, false, 1));
    std::vector<float> expected(static_cast<size_t>(tokens * rows), -1.0f), y = expected;
    pst_matrix_multiply(matrix.get(), x.data(), tokens, expected.data(), 1, pst::PORTABLE, 0);
    pst_matrix_multiply(matrix.get(), x.data(), tokens, y.data(), int(between(1, 3)), level, 0);
    return differ(y, expected);
}

bool float_product_differs(int level) {
    const int64_t rows = between(1, 20), columns = between(1, 100), tokens = between(1, 9);
    const std::vector<float> x = normals(tokens * columns);
    std::vector<float> weight = normals(rows * columns), expected(static_cast<size_t>(tokens * rows)), y = expected;
    const int bits = one_of({16, 32});
    if (bits == 16)
        for (float& pair : weight) pair = 1.0f;  // as two numbers of bf16: 0 and 1
    pst::Matrix matrix;
    matrix.floats = weight.data();
    matrix.rows = rows;
    matrix.columns = matrix.chunk = columns;
    matrix.bits = bits;
    pst_matrix_multiply(&matrix, x.data(), tokens, expected.data(), 1, pst::PORTABLE, 0);
    pst_matrix_multiply(&matrix, x.data(), tokens, y.data(), 1, level, 0);
    return differ(y, expected);
}

bool attention_differs(int level) {
    const int64_t heads = between(1, 5), head = between(1, 70), padded = pst::round_up(head, 16), context = between(1, 40);
    const int64_t bits = one_of<int64_t>({8, 16, 32}), begin = between(0, context - 1);
    const std::vector<float> q = normals(heads * head);
    std::vector<float> caches[2];
    std::vector<uint8_t> bytes[2];
    for (int which = 0; which < 2; ++which) {
        caches[which] = normals(context * padded);
        for (int64_t i = 0; i < context * padded; ++i) {
            const float value = i % padded < head ? caches[which][size_t(i)] : 0.0f;
            uint32_t word;
            std::memcpy(&word, &value, 4);
            if (bits == 8) word = uint32_t(int32_t(value * 30));
            if (bits == 16) word >>= 16;
            for (int64_t byte = 0; byte < bits / 8; ++byte) bytes[which].push_back(uint8_t(word >> 8 * byte));
        }
    }
    const std::vector<float> scales = normals(context);
    const float* some = bits == 8 ? scales.data() : nullptr;
    std::vector<float> expected(static_cast<size_t>(heads * head)), y = expected;
    std::vector<float> room(static_cast<size_t>(pst::attention_room(context, padded)));
    const float cap = float(between(0, 1) * 5);
    const auto attend = [&](int of_level, std::vector<float>& to) {
        const pst::AttentionJob job{q.data(), bytes[0].data(), bytes[1].data(), some, some, to.data(), heads, head, padded,
                                    begin, context, 0.3f, cap, room.data()};
        pst::functions(of_level).attend(job, bits);
    };
    attend(pst::PORTABLE, expected);
    attend(level, y);
    return differ(y, expected);
}

bool update_differs(int level) {
    const int64_t rank = between(1, 20), columns = between(1, 70), rows = between(1, 70), tokens = between(1, 6);
    const std::vector<float> v = normals(rank * pst::round_up(columns, 16)), u = normals(rank * pst::round_up(rows, 16));
    const std::vector<float> x = normals(tokens * columns);
    std::vector<float> expected = normals(tokens * rows), y = expected;
    std::vector<float> room(static_cast<size_t>(pst::update_room(rank, columns, rows)));
    const auto update = [&](int of_level, std::vector<float>& to) {
        const pst::UpdateJob job{v.data(), u.data(), rank, columns, rows, tokens, 0.1f, x.data(), to.data(), rows, room.data()};
        pst::functions(of_level).update(job, 32);
    };
    update(pst::PORTABLE, expected);
    update(level, y);
    return differ(y, expected);
}

bool glue_differs(int level) {
    const int64_t width = between(1, 100), half = between(1, 40), activation = between(0, pst::XIELU);
    const std::vector<float> x = normals(width), gain = normals(width), bias = normals(width), cosines = normals(half), sines = normals(half);
    const float numbers[4] = {0.1f, 0.2f, 0.5f, -1e-6f};
    const std::vector<float> heads = normals(2 * half);
    const auto results = [&](int of_level) {
        const pst::Functions& functions = pst::functions(of_level);
        std::vector<float> y(static_cast<size_t>(3 * width));
        functions.rms_norm(x.data(), gain.data(), 1e-5f, width, y.data());
        functions.layer_norm(x.data(), gain.data(), bias.data(), 1e-5f, width, y.data() + width);
        functions.gate(activation, numbers, x.data(), gain.data(), width, y.data() + 2 * width);
        std::vector<float> rotated = heads;
        functions.rotate(rotated.data(), cosines.data(), sines.data(), half);
        y.insert(y.end(), rotated.begin(), rotated.end());
        return y;
    };
    return differ(results(level), results(pst::PORTABLE));
}

}  // namespace

int main(int, char** arguments) {
    generator.seed(unsigned(std::atoi(arguments[2])));
    int wrong = 0;
    for (int level = 1; level < pst::LEVELS; ++level) {
        if (!pst::supports(level)) continue;
        std::printf("%s ", pst::NAMES[level]);
        int of_products = 0, of_floats = 0, of_attention = 0, of_updates = 0, of_glue = 0;
        for (int i = 0; i < std::atoi(arguments[1]); ++i) {
            of_products += product_differs(level);
            of_floats += float_product_differs(level);
            of_attention += attention_differs(level);
            of_updates += update_differs(level);
            of_glue += glue_differs(level);
        }
        std::printf("(%d %d %d %d %d)\n", of_products, of_floats, of_attention, of_updates, of_glue);
        wrong += of_products + of_floats + of_attention + of_updates + of_glue;
    }
    std::printf("%s is the best, %d wrong\n", pst::NAMES[pst::best_level()], wrong);
}
