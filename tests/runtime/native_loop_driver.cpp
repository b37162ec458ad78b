// Random matrices and random decoders through the native loop, arrays of exactly their sizes, for the sanitizers.
//   driver CASES SEED     prints how many were wrong
#include <cstdio>
#include <memory>
#include <random>

#include "../../pst_ds/core/kernels/cpp/decoder/decoder.cpp"

namespace {

std::mt19937 generator;
int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }
std::vector<float> normals(int64_t count) {
    std::vector<float> found(static_cast<size_t>(count));
    for (float& value : found) value = normal();
    return found;
}

struct Weight {
    std::vector<int8_t> codes;
    std::vector<uint16_t> scales;
    std::vector<float> dense;
    std::unique_ptr<pst::Matrix> matrix;
    Weight(int64_t rows, int64_t columns, int level) {
        const int bits = between(0, 1) ? 8 : 4, largest = bits == 8 ? 127 : 7;
        const int64_t group = std::vector<int64_t>{0, 32, 64, 128}[size_t(between(0, 3))];
        const int64_t groups = group ? (columns + group - 1) / group : 1, kept = between(0, 100);
        for (int64_t i = 0; i < rows * columns; ++i)
            codes.push_back(int8_t(between(1, 100) <= kept ? between(-largest, largest) : 0));
        for (int64_t i = 0; i < rows * groups; ++i) scales.push_back(uint16_t(between(0x3c00, 0x3d00)));
        for (int64_t i = 0; i < rows * columns; ++i)
            dense.push_back(codes[size_t(i)] * pst::widen(scales[size_t(i / columns * groups + (group ? i % columns / group : 0))]));
        if (between(0, 4)) {
            matrix.reset(pst::pack(codes.data(), scales.data(), rows, columns, bits, group, pst::functions(level).words, 1));
            return;
        }
        matrix.reset(new pst::Matrix());
        matrix->floats = dense.data(), matrix->rows = rows, matrix->columns = columns, matrix->bits = 32, matrix->chunk = columns;
    }
};

bool product_is_wrong(int level) {
    const int64_t rows = between(1, 40), columns = between(1, 700), tokens = between(0, 1) ? between(1, 9) : between(10, 40);
    const Weight weight(rows, columns, level);
    const std::vector<float> x = normals(tokens * columns);
    std::vector<float> y(static_cast<size_t>(tokens * rows), -1.0f);
    const bool in_bytes = pst::functions(level).quantize_to_bytes && between(0, 1);
    if (pst_matrix_multiply(weight.matrix.get(), x.data(), tokens, y.data(), int(between(1, 3)), level, in_bytes)) return true;
    const double share = in_bytes && weight.matrix->layout != pst::FLOATS ? 5e-3 : 1e-4;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) {
            double sum = 0, weights = 0, largest = 0;  // an activation is rounded to a share of the largest
            for (int64_t i = 0; i < columns; ++i) {
                const double w = weight.dense[size_t(r * columns + i)], value = x[size_t(t * columns + i)];
                sum += w * value, weights += std::abs(w), largest = std::max(largest, std::abs(value));
            }
            if (!(std::abs(y[size_t(t * rows + r)] - sum) <= share * weights * largest)) return true;
        }
    return false;
}

// A decoder of odd sizes: every token in a pass of its own gives the logits of all in one pass; in bytes only finite ones.
bool decoder_is_wrong(int level) {
    const int64_t share = between(1, 3), kv = between(1, 3), head = 2 * between(1, 20), context = between(3, 20);
    const pst::Shape shape{between(1, 2), between(1, 70), share * kv, kv, head, between(1, 70), between(1, 50), context,
                           between(1, 3), context, between(0, pst::XIELU), between(0, 1), 8 << between(0, 2), between(0, 1)};
    const pst::Numbers numbers{0.3, double(between(0, 1) * 5), double(between(0, 1) * 5), 0.5, 0.7};
    const int64_t sizes[pst::LINEARS][2] = {{(shape.heads + 2 * kv) * head, shape.hidden}, {shape.hidden, shape.heads * head},
                                            {shape.inner * (shape.gated ? 2 : 1), shape.hidden}, {shape.hidden, shape.inner}};
    const int64_t norms[pst::NORMS] = {shape.hidden, shape.hidden, shape.hidden, shape.hidden,
                                       shape.norm_of_heads ? head : shape.heads * head, shape.norm_of_heads ? head : kv * head};
    const int64_t half = between(1, head / 2);
    const std::vector<float> cosines = normals(context * half), sines = normals(context * half);
    std::vector<std::unique_ptr<Weight>> weights;
    std::vector<std::vector<float>> vectors;
    vectors.reserve(1000);
    const auto vector = [&](int64_t count) { return vectors.push_back(normals(count)), vectors.back().data(); };
    void* decoder = pst_decoder_new(&shape.layers, &numbers.attention_scale, level);
    pst_decoder_angles(decoder, cosines.data(), sines.data(), half, int(between(0, 1)));
    const float activation[4] = {0.1f, 0.2f, 0.5f, -1e-6f};
    const auto set_norm = [&](int64_t layer, int which, int64_t width) {
        pst_decoder_norm(decoder, layer, which, vector(width), between(0, 1) ? vector(width) : nullptr, 1e-5f);
    };
    for (int64_t layer = 0; layer < shape.layers; ++layer) {
        for (int which = 0; which < pst::LINEARS; ++which) {
            weights.emplace_back(new Weight(sizes[which][0], sizes[which][1], level));
            const void* matrix = weights.back()->matrix.get();
            pst_decoder_linear(decoder, layer, which, &matrix, 1, between(0, 1) ? vector(sizes[which][0]) : nullptr);
        }
        const bool of_heads = between(0, 1);
        for (int which = 0; which < pst::NORMS; ++which)
            if (which < pst::OF_QUERIES ? between(0, 1) : of_heads) set_norm(layer, which, norms[which]);
        pst_decoder_activation(decoder, layer, activation);
        pst_decoder_attention(decoder, layer, between(0, 3), between(-1, 0));
    }
    weights.emplace_back(new Weight(shape.vocabulary, shape.hidden, level));
    const void* head_matrix = weights.back()->matrix.get();
    pst_decoder_linear(decoder, 0, -1, &head_matrix, 1, nullptr);
    set_norm(0, -1, shape.hidden);
    const int bits = 1 << between(2, 5);
    const int64_t rows = between(1, 9), group = between(0, 1) * 32, groups = group ? (shape.hidden + group - 1) / group : 1;
    std::vector<uint8_t> table(static_cast<size_t>(rows * (bits == 4 ? (shape.hidden + 1) / 2 : shape.hidden * bits / 8)));
    for (size_t i = 0; i < table.size(); ++i) table[i] = uint8_t(bits < 16 || i % size_t(bits / 8) ? between(0, 63) : 0);
    const std::vector<uint16_t> scales(static_cast<size_t>(rows * groups), 0x3c00);
    pst_decoder_embedding(decoder, table.data(), bits > 8 ? nullptr : scales.data(), bits, bits > 8 ? 0 : group, 2.0f);
    std::vector<int64_t> places;  // an adapter with updates of some rows of some products
    const auto factor = [&](int64_t rows, int64_t columns) { return reinterpret_cast<int64_t>(vector(rows * pst::round_up(columns, 16))); };
    for (int64_t layer = 0; layer < shape.layers; ++layer)
        for (int which = 0; which < pst::LINEARS; ++which)
            for (int64_t i = between(0, pst::MOST_PARTS), offset = 0, rows; i > 0 && offset < sizes[which][0]; --i, offset += rows) {
                const int64_t rank = between(1, 20), columns = sizes[which][1];
                rows = between(1, sizes[which][0] - offset);
                for (int64_t of : {layer, int64_t(which), factor(rank, columns), factor(rank, rows), rank, columns, rows, offset})
                    places.push_back(of);
            }
    void* adapter = pst_adapter_new(shape.layers, places.data(), int64_t(places.size() / 8), 32, 0.1f);
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < context; ++i) ids.push_back(between(0, rows - 1));
    const std::vector<int64_t> sequence(static_cast<size_t>(context), shape.sequences - 1);
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < context; ++i) positions.push_back(i);
    std::vector<const void*> adapters(static_cast<size_t>(context));
    for (auto& of_token : adapters) of_token = between(0, 2) ? adapter : nullptr;
    std::vector<float> together(static_cast<size_t>(context * shape.vocabulary)), alone = together;
    const auto run_together = [&](int in_bytes) {
        pst_decoder_run(decoder, ids.data(), sequence.data(), positions.data(), adapters.data(), context, positions.data(), context,
                        together.data(), 2, in_bytes);
    };
    run_together(1);
    const bool is_number = std::all_of(together.begin(), together.end(), [](float value) { return std::isfinite(value); });
    run_together(0);
    const int64_t first = 0;
    for (int64_t i = 0; i < context; ++i)
        pst_decoder_run(decoder, ids.data() + i, sequence.data(), positions.data() + i, adapters.data() + i, 1, &first, 1,
                        alone.data() + i * shape.vocabulary, 1, 0);
    pst_decoder_free(decoder);
    pst_adapter_free(adapter);
    return !is_number || std::memcmp(together.data(), alone.data(), together.size() * sizeof(float)) != 0;
}

}  // namespace

int main(int, char** arguments) {
    generator.seed(unsigned(std::atoi(arguments[2])));
    int wrong = 0;
    for (int i = 0; i < std::atoi(arguments[1]); ++i)
        for (int level = 0; level < pst::LEVELS; ++level)
            if (pst::supports(level)) wrong += product_is_wrong(level) + decoder_is_wrong(level);
    std::printf("%d wrong\n", wrong);
}
