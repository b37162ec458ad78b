// The decoder: layers as a table, a cache for each sequence, and one pass over all layers for any number of tokens.
#pragma once

#include <memory>

#include "activations.hpp"

namespace pst {

// A product, or several of the same input whose results lie side by side.
struct Linear {
    struct Part {
        const Matrix* matrix;
        int64_t offset;
    };
    std::vector<Part> parts;
    const float* bias = nullptr;
    int64_t width = 0;  // of the result
};

enum LinearName { QKV, OUTPUT, GATE_UP, DOWN, LINEARS };
enum NormName { BEFORE_ATTENTION, AFTER_ATTENTION, BEFORE_MLP, AFTER_MLP, OF_QUERIES, OF_KEYS, NORMS };

struct Layer {
    Linear linear[LINEARS];
    const float* norm[NORMS] = {};  // gains; null: no such norm
    int64_t window = 0;             // positions that attention looks back, itself among them; 0: all
    int64_t rotary = -1;            // which table of angles; -1: none
};

struct Angles {
    const float *cosines, *sines;  // (context, half)
    int64_t half;
};

struct Shape {
    int64_t layers, hidden, heads, key_value_heads, head, inner, vocabulary, context, sequences, most;
    int64_t activation, gated, narrow_cache;  // most: tokens in a pass; gated: gate and up; narrow: a cache of bf16
    int64_t norm_of_heads;                    // norms of queries and keys: 1 for each head, 0 across heads
};

struct Numbers {
    double epsilon, attention_scale, attention_cap, logits_cap, logits_scale, residual_scale;
};

// What a pass is asked: tokens by their embeddings, each of a sequence and at a position; logits of some.
struct Pass {
    const float* embeddings;
    const int64_t *sequences, *positions, *wanted;
    int64_t tokens, num_wanted;
    float* logits;
};

class Decoder {
  public:
    Decoder(const Shape& shape, const Numbers& numbers, const Functions& kernels)
        : shape(shape), numbers(numbers), kernels(kernels), layers(size_t(shape.layers)) {
        padded = round_up(shape.head, 16);
        cache.resize(size_t(2 * shape.layers * shape.sequences * shape.key_value_heads * shape.context * padded) *
                     (shape.narrow_cache ? 2 : 4));
        const int64_t most = shape.most, queries = shape.heads * shape.head;
        qkv_width = queries + 2 * shape.key_value_heads * shape.head;
        added.resize(size_t(most * shape.hidden)), qkv.resize(size_t(most * qkv_width));
        attended.resize(size_t(most * queries)), inner.resize(size_t(most * shape.inner * (shape.gated ? 2 : 1)));
        widest = std::max({shape.hidden, queries, shape.inner});
        together.reserve(most, shape, widest);
    }

    // Every position must be in its sequence's cache already up to it, or be in this pass.
    void run(const Pass& pass, int threads) {
        for (int64_t i = int64_t(rooms.size()); i < threads; ++i) {
            rooms.emplace_back(new Room);
            rooms.back()->tokens.reserve(1, shape, widest);
            rooms.back()->rows.resize(size_t(room_for(widest)));
            rooms.back()->scores.resize(size_t(round_up(shape.context, 16) + 2 * padded));
        }
#pragma omp parallel num_threads(threads)
        {
            int number = 0, count = 1;
#ifdef _OPENMP
            number = omp_get_thread_num(), count = omp_get_num_threads();
#endif
            Room& room = *rooms[size_t(number)];
            const bool alone = pass.tokens == 1;
            Thread{*this, pass, number, count, alone, alone ? room.tokens : together, room}.work();
        }
    }

    Shape shape;
    Numbers numbers;
    const Functions& kernels;
    std::vector<Layer> layers;
    std::vector<Angles> angles;
    const float* last_norm = nullptr;
    Linear head;

  private:
    void* keys(int64_t layer, int64_t sequence, int64_t head) { return cached(2 * layer, sequence, head); }
    void* values(int64_t layer, int64_t sequence, int64_t head) { return cached(2 * layer + 1, sequence, head); }
    void* cached(int64_t which, int64_t sequence, int64_t head) {
        const int64_t row = (which * shape.sequences + sequence) * shape.key_value_heads + head;
        return cache.data() + size_t(row * shape.context * padded) * (shape.narrow_cache ? 2 : 4);
    }
    void put(const float* from, void* to, int64_t position) const {
        if (!shape.narrow_cache) {
            std::memcpy(static_cast<float*>(to) + position * padded, from, size_t(shape.head) * sizeof(float));
            return;
        }
        for (int64_t i = 0; i < shape.head; ++i) narrow(from[i], static_cast<bf16*>(to) + position * padded + i);
    }

    // What lies between products, of all tokens or of one, and the integers that a product takes.
    struct Tokens {
        std::vector<float> x, normed, gated;
        Activations integers;
        void reserve(int64_t tokens, const Shape& shape, int64_t widest) {
            x.resize(size_t(tokens * shape.hidden)), normed.resize(size_t(tokens * shape.hidden));
            gated.resize(size_t(tokens * shape.inner));
            integers.reserve(tokens, widest);
        }
    };
    // A thread's own memory.
    struct Room {
        Tokens tokens;
        std::vector<uint8_t> rows;
        std::vector<float> scores;
    };

    // A thread's share of a pass. All threads run the same steps; what one writes, others read after wait(). Of a single
    // token every thread does what lies between products itself, `alone`: cheaper than waiting for one that does.
    struct Thread {
        Decoder& d;
        const Pass& pass;
        const int number, count;
        const bool alone;
        Tokens& own;
        Room& room;

        void wait() const {
#pragma omp barrier
        }
        template <class Work> void share(int64_t items, const Work& work) const {
            for (int64_t i = items * number / count; i < items * (number + 1) / count; ++i) work(i);
        }
        // Work on each token, and its results to be read.
        template <class Work> void each(int64_t tokens, const Work& work) const {
            if (alone) {
                for (int64_t i = 0; i < tokens; ++i) work(i);
                return;
            }
            share(tokens, work);
            wait();
        }

        void work() const {
            const int64_t hidden = d.shape.hidden;
            each(pass.tokens, [&](int64_t t) {
                std::memcpy(own.x.data() + t * hidden, pass.embeddings + t * hidden, size_t(hidden) * sizeof(float));
            });
            for (int64_t i = 0; i < d.shape.layers; ++i) layer(d.layers[size_t(i)], i);
            if (!pass.num_wanted) return;
            each(pass.num_wanted, [&](int64_t i) {
                normalize(d.last_norm, own.x.data() + pass.wanted[i] * hidden, hidden, own.normed.data() + i * hidden);
            });
            product(d.head, own.normed.data(), pass.num_wanted, pass.logits);
            share(pass.num_wanted, [&](int64_t i) { finish(pass.logits + i * d.shape.vocabulary); });
        }

        void finish(float* logits) const {
            const float scale = float(d.numbers.logits_scale), cap = float(d.numbers.logits_cap);
            if (scale == 1 && !(cap > 0)) return;
            for (int64_t i = 0; i < d.shape.vocabulary; ++i) {
                logits[i] *= scale;
                if (cap > 0) logits[i] = cap * std::tanh(logits[i] / cap);
            }
        }

        void normalize(const float* gain, const float* x, int64_t width, float* y) const {
            if (gain) return d.kernels.rms_norm(x, gain, float(d.numbers.epsilon), width, y);
            if (y != x) std::memcpy(y, x, size_t(width) * sizeof(float));
        }

        // y (tokens, width) = x W' + bias; x is complete, y is when it returns.
        void product(const Linear& linear, const float* x, int64_t tokens, float* y) const {
            const Matrix* rounded_for = nullptr;
            for (const Linear::Part& part : linear.parts) {
                const Matrix& m = *part.matrix;
                const bool same = rounded_for && rounded_for->chunk == m.chunk && rounded_for->levels == m.levels;
                if (m.layout != FLOATS && !same) {
                    if (!alone && rounded_for) wait();
                    if (alone || number == 0) own.integers.begin(m);
                    if (!alone) wait();
                    each(tokens, [&](int64_t t) { d.kernels.quantize(m, x + t * m.columns, t, own.integers); });
                    rounded_for = &m;
                }
                const int64_t first = m.blocks() * number / count, last = m.blocks() * (number + 1) / count;
                float* to = y + part.offset;
                d.kernels.product({m, x, own.integers, tokens, first, last, to, linear.width, room.rows.data()});
                if (!linear.bias) continue;
                for (int64_t t = 0; t < tokens; ++t)
                    for (int64_t i = first * ROWS; i < std::min(m.rows, last * ROWS); ++i)
                        to[t * linear.width + i] += linear.bias[part.offset + i];
            }
            wait();
        }

        void layer(const Layer& layer, int64_t index) const {
            const Shape& s = d.shape;
            each(pass.tokens, [&](int64_t t) {
                normalize(layer.norm[BEFORE_ATTENTION], own.x.data() + t * s.hidden, s.hidden, own.normed.data() + t * s.hidden);
            });
            product(layer.linear[QKV], own.normed.data(), pass.tokens, d.qkv.data());
            attention(layer, index);
            product(layer.linear[OUTPUT], d.attended.data(), pass.tokens, d.added.data());
            add(layer.norm[AFTER_ATTENTION], layer.norm[BEFORE_MLP]);
            product(layer.linear[GATE_UP], own.normed.data(), pass.tokens, d.inner.data());
            const int64_t width = layer.linear[GATE_UP].width;
            each(pass.tokens, [&](int64_t t) {
                const float* gates = d.inner.data() + t * width;
                d.kernels.gate(s.activation, gates, s.gated ? gates + s.inner : nullptr, s.inner, own.gated.data() + t * s.inner);
            });
            product(layer.linear[DOWN], own.gated.data(), pass.tokens, d.added.data());
            add(layer.norm[AFTER_MLP], nullptr);
        }

        // x += what a half of the layer computed; then, where there is a norm for the next half, normed.
        void add(const float* after, const float* before) const {
            const int64_t hidden = d.shape.hidden;
            each(pass.tokens, [&](int64_t t) {
                float *x = own.x.data() + t * hidden, *normed = own.normed.data() + t * hidden;
                normalize(after, d.added.data() + t * hidden, hidden, normed);
                for (int64_t i = 0; i < hidden; ++i) x[i] += float(d.numbers.residual_scale) * normed[i];
                normalize(before, x, hidden, normed);
            });
        }

        void attention(const Layer& layer, int64_t index) const {
            const Shape& s = d.shape;
            const int64_t heads = s.key_value_heads, items = pass.tokens * heads;
            if (layer.norm[OF_QUERIES] && !s.norm_of_heads) {
                share(pass.tokens, [&](int64_t t) {
                    float *queries = d.qkv.data() + t * d.qkv_width, *keys = queries + s.heads * s.head;
                    normalize(layer.norm[OF_QUERIES], queries, s.heads * s.head, queries);
                    normalize(layer.norm[OF_KEYS], keys, heads * s.head, keys);
                });
                wait();
            }
            share(items, [&](int64_t i) { prepare(layer, index, i / heads, i % heads); });
            if (!alone) wait();  // or the same thread attends to the head that it has put there
            share(items, [&](int64_t i) { attend(layer, index, i / heads, i % heads); });
            wait();
        }

        // Norms, angles and the cache, for a key-value head of a token and the queries that look at it.
        void prepare(const Layer& layer, int64_t index, int64_t t, int64_t h) const {
            const Shape& s = d.shape;
            const int64_t group = s.heads / s.key_value_heads, position = pass.positions[t], sequence = pass.sequences[t];
            float *queries = d.qkv.data() + t * d.qkv_width, *keys = queries + s.heads * s.head, *values = keys + s.key_value_heads * s.head;
            for (int64_t i = 0; i < group; ++i) turn(layer, layer.norm[OF_QUERIES], queries + (h * group + i) * s.head, position);
            turn(layer, layer.norm[OF_KEYS], keys + h * s.head, position);
            d.put(keys + h * s.head, d.keys(index, sequence, h), position);
            d.put(values + h * s.head, d.values(index, sequence, h), position);
        }

        void turn(const Layer& layer, const float* gain, float* head, int64_t position) const {
            if (gain && d.shape.norm_of_heads) normalize(gain, head, d.shape.head, head);
            if (layer.rotary < 0) return;
            const Angles& angles = d.angles[size_t(layer.rotary)];
            d.kernels.rotate(head, angles.cosines + position * angles.half, angles.sines + position * angles.half, angles.half);
        }

        void attend(const Layer& layer, int64_t index, int64_t t, int64_t h) const {
            const Shape& s = d.shape;
            const int64_t group = s.heads / s.key_value_heads, end = pass.positions[t] + 1;
            const int64_t begin = layer.window && end > layer.window ? end - layer.window : 0;
            d.kernels.attend({d.qkv.data() + t * d.qkv_width + h * group * s.head, d.keys(index, pass.sequences[t], h),
                              d.values(index, pass.sequences[t], h),
                              d.attended.data() + t * s.heads * s.head + h * group * s.head, group, s.head, d.padded, begin,
                              end, float(d.numbers.attention_scale), float(d.numbers.attention_cap), room.scores.data()},
                             s.narrow_cache != 0);
        }
    };

    int64_t padded, qkv_width, widest;
    std::vector<uint8_t> cache;
    std::vector<float> added, qkv, attended, inner;  // what products write, and attention: of all threads
    Tokens together;
    std::vector<std::unique_ptr<Room>> rooms;
};

}  // namespace pst

// 0, or 1 without memory.
#define PST_API extern "C" __attribute__((visibility("default")))

PST_API int pst_decoder_level() { return pst::best_level(); }

PST_API void* pst_matrix_of_codes(const int8_t* codes, const uint16_t* scales, int64_t rows, int64_t columns, int bits,
                                  int64_t group, int level) try {
    return pst::pack(codes, scales, rows, columns, bits, group, pst::functions(level).words);
} catch (const std::bad_alloc&) {
    return nullptr;
}

PST_API void* pst_matrix_of_floats(const void* floats, int64_t rows, int64_t columns, int bits) try {
    auto m = new pst::Matrix();
    m->floats = floats, m->rows = rows, m->columns = columns, m->bits = bits, m->chunk = std::max<int64_t>(1, columns);
    return m;
} catch (const std::bad_alloc&) {
    return nullptr;
}

PST_API int64_t pst_matrix_bytes(const void* matrix) { return static_cast<const pst::Matrix*>(matrix)->bytes(); }
PST_API int pst_matrix_layout(const void* matrix) { return static_cast<const pst::Matrix*>(matrix)->layout; }
PST_API void pst_matrix_free(void* matrix) { delete static_cast<pst::Matrix*>(matrix); }

// y (tokens, rows) = x W'.
PST_API int pst_matrix_multiply(const void* matrix, const float* x, int64_t tokens, float* y, int threads, int level) try {
    const pst::Matrix& m = *static_cast<const pst::Matrix*>(matrix);
    const pst::Functions& kernels = pst::functions(level);
    pst::Activations q;
    if (m.layout != pst::FLOATS) {
        q.reserve(tokens, m.columns), q.begin(m);
        for (int64_t t = 0; t < tokens; ++t) kernels.quantize(m, x + t * m.columns, t, q);
    }
    std::vector<uint8_t> rooms(size_t(pst::room_for(m.columns)) * size_t(threads));
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < threads; ++i)
        kernels.product({m, x, q, tokens, m.blocks() * i / threads, m.blocks() * (i + 1) / threads, y, m.rows,
                         rooms.data() + size_t(pst::room_for(m.columns)) * size_t(i)});
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

PST_API void* pst_decoder_new(const int64_t* shape, const double* numbers, int level) try {
    pst::Shape s;
    pst::Numbers n;
    std::memcpy(&s, shape, sizeof s);
    std::memcpy(&n, numbers, sizeof n);
    return new pst::Decoder(s, n, pst::functions(level));
} catch (const std::bad_alloc&) {
    return nullptr;
}

PST_API void pst_decoder_free(void* decoder) { delete static_cast<pst::Decoder*>(decoder); }

PST_API void pst_decoder_angles(void* decoder, const float* cosines, const float* sines, int64_t half) {
    static_cast<pst::Decoder*>(decoder)->angles.push_back({cosines, sines, half});
}

// Which: one of LinearName, or -1 for the head, of which `layer` is not looked at.
PST_API void pst_decoder_linear(void* decoder, int64_t layer, int which, const void* const* matrices, int64_t count,
                                const float* bias) {
    auto& d = *static_cast<pst::Decoder*>(decoder);
    pst::Linear& linear = which < 0 ? d.head : d.layers[size_t(layer)].linear[which];
    linear.bias = bias;
    for (int64_t i = 0; i < count; ++i) {
        auto matrix = static_cast<const pst::Matrix*>(matrices[i]);
        linear.parts.push_back({matrix, linear.width});
        linear.width += matrix->rows;
    }
}

// Which: one of NormName, or -1 for the last.
PST_API void pst_decoder_norm(void* decoder, int64_t layer, int which, const float* gain) {
    auto& d = *static_cast<pst::Decoder*>(decoder);
    (which < 0 ? d.last_norm : d.layers[size_t(layer)].norm[which]) = gain;
}

PST_API void pst_decoder_attention(void* decoder, int64_t layer, int64_t window, int64_t rotary) {
    auto& d = *static_cast<pst::Decoder*>(decoder);
    d.layers[size_t(layer)].window = window, d.layers[size_t(layer)].rotary = rotary;
}

PST_API int pst_decoder_run(void* decoder, const float* embeddings, const int64_t* sequences, const int64_t* positions,
                            int64_t tokens, const int64_t* wanted, int64_t num_wanted, float* logits, int threads) try {
    static_cast<pst::Decoder*>(decoder)->run({embeddings, sequences, positions, wanted, tokens, num_wanted, logits}, threads);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
