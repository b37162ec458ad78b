// The decoder: a table of layers, a cache per sequence, and one pass over all layers for any number of tokens.
//
// Layout
//   cache   [layer][keys, values][sequence][key-value head][position][padded head], as int8, bf16 or fp32 (cache_bits).
//           A head is padded to a multiple of 16 numbers, which stay zero. int8 rows have a scale each (cache_scales).
//   x       (tokens, hidden) fp32: the residual stream of a pass
//   qkv     (tokens, heads + 2 * key-value heads, head) fp32: queries, keys, values of a layer side by side
//   inner   (tokens, inner or 2 * inner): gate, then up
// These buffers have room for `most` tokens and belong to the decoder, so it runs one pass at a time. Matrices, norms,
// angles, embeddings and adapters belong to the caller (pst_ds/runtime/native_loop.py), which keeps them alive.
//
// Threads: the caller's thread leads, those of `pool` help, and each has a Room of working memory. A step of a layer is
// one or more pool.run, which return when all pieces are done, so pieces need no locks. Pieces write different parts of a buffer.
// Results do not depend on the number of threads, nor on the other tokens of a pass.
#pragma once

#include <cstdlib>
#include <memory>

#include "activations.hpp"
#include "packing/pack.hpp"
#include "pool.hpp"

namespace pst {

// A product, or several of the same input with results side by side.
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

// Low-rank updates of a user. The factors are not owned: see UpdateJob.
struct Adapter {
    struct Part {
        int64_t layer;
        int64_t name;  // one of LinearName
        const void* v;
        const void* u;
        int64_t rank;
        int64_t columns;
        int64_t rows;
        int64_t offset;  // of the rows in the product's result
    };
    int bits;
    float beta;
    int64_t room;  // for the largest update
    std::vector<std::vector<Part>> parts;  // [layer * LINEARS + name], at most MOST_PARTS each, of different rows
};
constexpr int64_t MOST_PARTS = 3;

// A root-mean-square norm, or with `bias` a layer norm, which subtracts the mean.
struct Norm {
    const float* gain = nullptr;  // null without the norm
    const float* bias = nullptr;
    float epsilon = 0;
};

struct Layer {
    Linear linear[LINEARS];
    Norm norm[NORMS];
    const float* activation = nullptr;  // parameters of the activation, if it has any
    int64_t window = 0;  // positions visible to attention, including the current one; 0: all
    int64_t rotary = -1;  // index of the table of angles; -1: none
};

struct Angles {
    const float* cosines;  // (context, half)
    const float* sines;    // (context, half)
    int64_t half;
    bool neighbours;  // pairs are (2 i, 2 i + 1), not (i, i + half)
};

struct Shape {
    int64_t layers;
    int64_t hidden;
    int64_t heads;
    int64_t key_value_heads;
    int64_t head;
    int64_t inner;
    int64_t vocabulary;
    int64_t context;
    int64_t sequences;
    int64_t most;
    // most: tokens per pass; gated: gate and up; cache bits 8: codes, 16: bf16, 32: fp32
    int64_t activation;
    int64_t gated;
    int64_t cache_bits;
    int64_t norm_of_heads;  // norms of queries and keys: 1 per head, 0 across heads
};

struct Numbers {
    double attention_scale;
    double attention_cap;
    double logits_cap;
    double logits_scale;
    double residual_scale;
};

// Rows of the embedding, not owned: fp32 or bf16 numbers (32 or 16 bits), or codes with a scale per `group` columns.
struct Embedding {
    const uint8_t* rows = nullptr;
    const uint16_t* scales = nullptr;
    int bits = 0;
    int64_t width = 0;
    int64_t group = 0;
    float scale = 1;

    void read(int64_t id, float* to) const {
        const int64_t groups = bits > 8 ? 0 : (width + group - 1) / group;
        const uint8_t* row = rows + id * (bits == 4 ? (width + 1) / 2 : width * bits / 8);
        for (int64_t i = 0; i < width; ++i) {
            if (bits == 32) std::memcpy(to + i, row + 4 * i, 4);
            bf16 narrow = 0;
            if (bits == 16) std::memcpy(&narrow, row + 2 * i, 2);
            if (bits == 16) to[i] = widen(narrow);
            if (bits == 8) to[i] = float(int8_t(row[i]));
            if (bits == 4) to[i] = float(nibble(row[i / 2], i % 2));
            if (bits <= 8) to[i] *= widen(scales[id * groups + i / group]);
            to[i] *= scale;
        }
    }
};

// The request of a pass: tokens, each with sequence, position and the adapter of its user, if any; which logits.
// in_bytes: use 8-bit activations if the kernels support them.
struct Pass {
    const int64_t* ids;
    const int64_t* sequences;
    const int64_t* positions;
    const int64_t* wanted;
    const Adapter* const* adapters;  // null for tokens of the base model
    int64_t tokens;
    int64_t num_wanted;
    float* logits;
    bool in_bytes;
};

class Decoder {
  public:
    Decoder(const Shape& shape, const Numbers& numbers, const Functions& kernels)
        : shape(shape), numbers(numbers), kernels(kernels), layers(size_t(shape.layers)) {
        padded = round_up(shape.head, 16);
        const int64_t rows = 2 * shape.layers * shape.sequences * shape.key_value_heads * shape.context;
        cache.reset(static_cast<uint8_t*>(std::calloc(size_t(rows), size_t(padded * shape.cache_bits / 8))));
        if (!cache) throw std::bad_alloc();
        if (shape.cache_bits == 8) cache_scales.resize(size_t(rows));
        const int64_t most = shape.most;
        const int64_t queries = shape.heads * shape.head;
        qkv_width = queries + 2 * shape.key_value_heads * shape.head;
        for (auto* buffer : {&x, &normed, &added}) buffer->resize(size_t(most * shape.hidden));
        qkv.resize(size_t(most * qkv_width));
        attended.resize(size_t(most * queries));
        inner.resize(size_t(most * shape.inner * (shape.gated ? 2 : 1)));
        gated.resize(size_t(most * shape.inner));
        widest = std::max({shape.hidden, queries, shape.inner});
        integers.reserve(most, widest);
    }

    // All earlier positions of a sequence must be in its cache, or in this pass.
    void run(const Pass& pass, int threads) {
        for (int64_t i = int64_t(rooms.size()); i < threads; ++i) {
            rooms.emplace_back(new Room);
            rooms.back()->rows.resize(size_t(room_for(widest)));
            rooms.back()->scores.resize(size_t(attention_room(shape.context, padded)));
        }
        find_groups(pass);
        pool.grow(threads);
        pool.wake(threads);
        work(pass);
        pool.rest();
    }

    // Make the first `length` positions of a sequence those of another.
    void copy(int64_t from, int64_t to, int64_t length) {
        for (int64_t i = 0; i < 2 * shape.layers; ++i)
            for (int64_t h = 0; h < shape.key_value_heads; ++h) {
                const Cached source = cached(int(i % 2), i / 2, from, h);
                const Cached target = cached(int(i % 2), i / 2, to, h);
                std::memcpy(target.rows, source.rows, size_t(length * padded * shape.cache_bits / 8));
                if (source.scales) std::memcpy(target.scales, source.scales, size_t(length) * sizeof(float));
            }
    }

    Shape shape;
    Numbers numbers;
    const Functions& kernels;
    std::vector<Layer> layers;
    std::vector<Angles> angles;
    Embedding embedding;
    Norm last_norm;
    Linear head;

  private:
    // Rows of the cache of a layer's keys (0) or values (1), for a sequence and a head.
    struct Cached {
        uint8_t* rows;
        float* scales;
    };
    Cached cached(int which, int64_t layer, int64_t sequence, int64_t head) {
        const int64_t list = ((2 * layer + which) * shape.sequences + sequence) * shape.key_value_heads + head;
        float* scales = cache_scales.empty() ? nullptr : cache_scales.data() + list * shape.context;
        return {cache.get() + list * shape.context * padded * shape.cache_bits / 8, scales};
    }
    void put(const float* from, const Cached& to, int64_t position) const {
        uint8_t* row = to.rows + position * padded * shape.cache_bits / 8;
        if (shape.cache_bits == 32) {
            std::memcpy(row, from, size_t(shape.head) * sizeof(float));
        } else if (shape.cache_bits == 16) {
            for (int64_t i = 0; i < shape.head; ++i) narrow(from[i], reinterpret_cast<bf16*>(row) + i);
        } else {
            int32_t largest = 0;
            int32_t bits;
            for (int64_t i = 0; i < shape.head; ++i) {
                std::memcpy(&bits, from + i, 4);
                largest = std::max(largest, bits & 0x7fffffff);
            }
            const Rounding rounding(largest, 127);
            for (int64_t i = 0; i < shape.head; ++i)
                row[i] = uint8_t(rounding.inverse > 0 ? int8_t(std::lrint(from[i] * rounding.inverse)) : 0);
            to.scales[position] = rounding.scale;
        }
    }

    // Working memory of a thread.
    struct Room {
        std::vector<uint8_t> rows;
        std::vector<float> scores;
        std::vector<float> update;
    };

    // Consecutive tokens with one adapter.
    struct Group {
        const Adapter* adapter;
        int64_t first;
        int64_t tokens;
    };
    void find_groups(const Pass& pass) {
        groups.clear();
        int64_t room = 0;
        for (int64_t t = 0; t < pass.tokens; ++t) {
            const Adapter* adapter = pass.adapters[t];
            if (!adapter) continue;
            const bool joins = !groups.empty() && groups.back().adapter == adapter &&
                               groups.back().first + groups.back().tokens == t && groups.back().tokens < HEADS_TOGETHER;
            if (joins) ++groups.back().tokens;
            else groups.push_back({adapter, t, 1});
            room = std::max(room, adapter->room);
        }
        for (auto& of_thread : rooms)
            if (of_thread->update.size() < size_t(room)) of_thread->update.resize(size_t(room));
    }

    // Work on each token; a single token uses one thread.
    template <class Work> void each(int64_t tokens, const Work& work) {
        pool.run(tokens, [&](int64_t t, int) { work(t); });
    }

    void work(const Pass& pass) {
        const int64_t hidden = shape.hidden;
        each(pass.tokens, [&](int64_t t) { embedding.read(pass.ids[t], x.data() + t * hidden); });
        for (int64_t i = 0; i < shape.layers; ++i) run_layer(pass, layers[size_t(i)], i);
        if (!pass.num_wanted) return;
        each(pass.num_wanted, [&](int64_t i) {
            normalize(last_norm, x.data() + pass.wanted[i] * hidden, hidden, normed.data() + i * hidden);
        });
        product(head, normed.data(), pass.num_wanted, pass.logits, false);
        each(pass.num_wanted, [&](int64_t i) { finish(pass.logits + i * shape.vocabulary); });
    }

    void finish(float* logits) const {
        const float scale = float(numbers.logits_scale);
        const float cap = float(numbers.logits_cap);
        if (scale == 1 && !(cap > 0)) return;
        for (int64_t i = 0; i < shape.vocabulary; ++i) {
            logits[i] *= scale;
            if (cap > 0) logits[i] = cap * std::tanh(logits[i] / cap);
        }
    }

    void normalize(const Norm& norm, const float* from, int64_t width, float* to) const {
        if (norm.bias) return kernels.layer_norm(from, norm.gain, norm.bias, norm.epsilon, width, to);
        if (norm.gain) return kernels.rms_norm(from, norm.gain, norm.epsilon, width, to);
        if (to != from) std::memcpy(to, from, size_t(width) * sizeof(float));
    }

    // to (tokens, width) = from W' + bias.
    void product(const Linear& linear, const float* from, int64_t tokens, float* to, bool in_bytes) {
        const Matrix* rounded_for = nullptr;
        in_bytes = in_bytes && kernels.quantize_to_bytes;
        const auto quantize = in_bytes ? kernels.quantize_to_bytes : kernels.quantize;
        for (const Linear::Part& part : linear.parts) {
            const Matrix& m = *part.matrix;
            if (m.layout != FLOATS && !(rounded_for && rounded_for->chunk == m.chunk && rounded_for->levels == m.levels && rounded_for->bits == m.bits)) {
                integers.begin(m, in_bytes);
                each(tokens, [&](int64_t t) { quantize(m, from + t * m.columns, t, integers); });
                rounded_for = &m;
            }
            float* y = to + part.offset;
            const int64_t pairs = (m.blocks() + 1) / 2;
            const int64_t pieces = std::min(pairs, int64_t(PIECES * pool.threads()));
            pool.run(pieces, [&](int64_t i, int thread) {
                const int64_t first = 2 * (pairs * i / pieces);
                const int64_t last = std::min(m.blocks(), 2 * (pairs * (i + 1) / pieces));
                kernels.product({m, from, integers, tokens, first, last, y, linear.width, rooms[size_t(thread)]->rows.data()});
                if (!linear.bias) return;
                for (int64_t t = 0; t < tokens; ++t)
                    for (int64_t row = first * m.height; row < std::min(m.rows, last * m.height); ++row)
                        y[t * linear.width + row] += linear.bias[part.offset + row];
            });
        }
    }

    // A product of a layer for all tokens, with the updates of their users.
    void layer_product(const Pass& pass, int64_t index, LinearName name, const float* from, float* to) {
        const Linear& linear = layers[size_t(index)].linear[name];
        product(linear, from, pass.tokens, to, pass.in_bytes);
        const int64_t items = int64_t(groups.size()) * MOST_PARTS;
        const auto part_of = [&](int64_t i) -> const Adapter::Part* {
            if (i >= items) return nullptr;
            const auto& parts = groups[size_t(i / MOST_PARTS)].adapter->parts[size_t(index * LINEARS + name)];
            return i % MOST_PARTS < int64_t(parts.size()) ? &parts[size_t(i % MOST_PARTS)] : nullptr;
        };
        if (items) pool.run(items, [&](int64_t i, int thread) {
            const Adapter::Part* p = part_of(i);
            const Adapter::Part* next = part_of(i + MOST_PARTS);
            if (!p) return;
            const Group& group = groups[size_t(i / MOST_PARTS)];
            // factors of several users come from memory
            for (int64_t at = 0; next && at < next->rank * next->columns * group.adapter->bits / 8; at += 64)
                __builtin_prefetch(static_cast<const char*>(next->v) + at, 0, 2);
            kernels.update({p->v, p->u, p->rank, p->columns, p->rows, group.tokens, group.adapter->beta, from + group.first * p->columns,
                            to + group.first * linear.width + p->offset, linear.width, rooms[size_t(thread)]->update.data()},
                           group.adapter->bits);
        });
    }

    void run_layer(const Pass& pass, const Layer& layer, int64_t index) {
        each(pass.tokens, [&](int64_t t) {
            normalize(layer.norm[BEFORE_ATTENTION], x.data() + t * shape.hidden, shape.hidden, normed.data() + t * shape.hidden);
        });
        layer_product(pass, index, QKV, normed.data(), qkv.data());
        attention(pass, layer, index);
        layer_product(pass, index, OUTPUT, attended.data(), added.data());
        add(pass, layer.norm[AFTER_ATTENTION], layer.norm[BEFORE_MLP]);
        layer_product(pass, index, GATE_UP, normed.data(), inner.data());
        const int64_t width = layer.linear[GATE_UP].width;
        each(pass.tokens, [&](int64_t t) {
            const float* gates = inner.data() + t * width;
            kernels.gate(shape.activation, layer.activation, gates, shape.gated ? gates + shape.inner : nullptr, shape.inner, gated.data() + t * shape.inner);
        });
        layer_product(pass, index, DOWN, gated.data(), added.data());
        add(pass, layer.norm[AFTER_MLP], Norm());
    }

    // Add the result of half a layer to x; then apply the norm of the next half, if any.
    void add(const Pass& pass, const Norm& after, const Norm& before) {
        const int64_t hidden = shape.hidden;
        each(pass.tokens, [&](int64_t t) {
            float* sum = x.data() + t * hidden;
            float* y = normed.data() + t * hidden;
            normalize(after, added.data() + t * hidden, hidden, y);
            for (int64_t i = 0; i < hidden; ++i) sum[i] += float(numbers.residual_scale) * y[i];
            normalize(before, sum, hidden, y);
        });
    }

    void attention(const Pass& pass, const Layer& layer, int64_t index) {
        const int64_t heads = shape.key_value_heads;
        const int64_t items = pass.tokens * heads;
        if (layer.norm[OF_QUERIES].gain && !shape.norm_of_heads)
            each(pass.tokens, [&](int64_t t) {
                float* queries = qkv.data() + t * qkv_width;
                float* of_keys = queries + shape.heads * shape.head;
                normalize(layer.norm[OF_QUERIES], queries, shape.heads * shape.head, queries);
                normalize(layer.norm[OF_KEYS], of_keys, heads * shape.head, of_keys);
            });
        if (pass.tokens > 1) each(items, [&](int64_t i) { prepare(pass, layer, index, i / heads, i % heads); });
        pool.run(items, [&](int64_t i, int thread) {
            if (pass.tokens == 1) prepare(pass, layer, index, 0, i);
            attend(pass, layer, index, i / heads, i % heads, rooms[size_t(thread)]->scores.data());
        });
    }

    // Norms, angles and the cache, for a key-value head of a token and the queries that share it.
    void prepare(const Pass& pass, const Layer& layer, int64_t index, int64_t t, int64_t h) {
        const int64_t group = shape.heads / shape.key_value_heads;
        const int64_t position = pass.positions[t];
        const int64_t sequence = pass.sequences[t];
        float* queries = qkv.data() + t * qkv_width;
        float* key = queries + (shape.heads + h) * shape.head;
        float* value = key + shape.key_value_heads * shape.head;
        for (int64_t i = 0; i < group; ++i) turn(layer, layer.norm[OF_QUERIES], queries + (h * group + i) * shape.head, position);
        turn(layer, layer.norm[OF_KEYS], key, position);
        put(key, cached(0, index, sequence, h), position);
        put(value, cached(1, index, sequence, h), position);
    }

    void turn(const Layer& layer, const Norm& norm, float* of_head, int64_t position) const {
        if (norm.gain && shape.norm_of_heads) normalize(norm, of_head, shape.head, of_head);
        if (layer.rotary < 0) return;
        const Angles& table = angles[size_t(layer.rotary)];
        const float* cosines = table.cosines + position * table.half;
        const float* sines = table.sines + position * table.half;
        if (!table.neighbours) return kernels.rotate(of_head, cosines, sines, table.half);
        for (int64_t i = 0; i < table.half; ++i) {
            const float a = of_head[2 * i];
            const float b = of_head[2 * i + 1];
            of_head[2 * i] = a * cosines[i] - b * sines[i];
            of_head[2 * i + 1] = b * cosines[i] + a * sines[i];
        }
    }

    void attend(const Pass& pass, const Layer& layer, int64_t index, int64_t t, int64_t h, float* scores) {
        const int64_t group = shape.heads / shape.key_value_heads;
        const int64_t end = pass.positions[t] + 1;
        const int64_t first = h * group * shape.head;
        const int64_t begin = layer.window && end > layer.window ? end - layer.window : 0;
        const Cached k = cached(0, index, pass.sequences[t], h);
        const Cached v = cached(1, index, pass.sequences[t], h);
        kernels.attend({qkv.data() + t * qkv_width + first, k.rows, v.rows, k.scales, v.scales, attended.data() + t * shape.heads * shape.head + first, group, shape.head, padded, begin, end,
                        float(numbers.attention_scale), float(numbers.attention_cap), scores},
                       shape.cache_bits);
    }

    static constexpr int PIECES = 2;  // of a product, per thread
    int64_t padded;
    int64_t qkv_width;
    int64_t widest;
    struct Free {
        void operator()(uint8_t* memory) const { std::free(memory); }
    };
    std::unique_ptr<uint8_t[], Free> cache;  // pages that no sequence has reached take no memory
    std::vector<float> cache_scales;  // for an 8-bit cache: per row
    std::vector<float> x;
    std::vector<float> normed;
    std::vector<float> added;
    std::vector<float> qkv;
    std::vector<float> attended;
    std::vector<float> inner;
    std::vector<float> gated;
    Activations integers;
    std::vector<std::unique_ptr<Room>> rooms;
    std::vector<Group> groups;  // of the current pass
    Pool pool;
};

}  // namespace pst

// Returns 0, or 1 if memory is short.
#define PST_API extern "C" __attribute__((visibility("default")))

PST_API int pst_decoder_level() { return pst::best_level(); }
PST_API int pst_decoder_supports(int level) { return pst::supports(level); }

PST_API void* pst_matrix_of_codes(const int8_t* codes, const uint16_t* scales, int64_t rows, int64_t columns, int bits,
                                  int64_t group, int level, int threads) try {
    return pst::pack(codes, scales, rows, columns, bits, group, pst::functions(level).words, threads);
} catch (const std::bad_alloc&) {
    return nullptr;
}

PST_API void* pst_matrix_of_floats(const void* floats, int64_t rows, int64_t columns, int bits) try {
    auto m = new pst::Matrix();
    m->floats = floats;
    m->rows = rows;
    m->columns = columns;
    m->bits = bits;
    m->chunk = std::max<int64_t>(1, columns);
    return m;
} catch (const std::bad_alloc&) {
    return nullptr;
}

PST_API int64_t pst_matrix_bytes(const void* matrix) { return static_cast<const pst::Matrix*>(matrix)->bytes(); }
PST_API void pst_matrix_free(void* matrix) { delete static_cast<pst::Matrix*>(matrix); }

// y (tokens, rows) = x W'. in_bytes: quantise x to 8 bits; returns 2 if these kernels do not support it.
PST_API int pst_matrix_multiply(const void* matrix, const float* x, int64_t tokens, float* y, int threads, int level,
                                int in_bytes) try {
    const pst::Matrix& m = *static_cast<const pst::Matrix*>(matrix);
    const pst::Functions& kernels = pst::functions(level);
    const auto quantize = in_bytes ? kernels.quantize_to_bytes : kernels.quantize;
    if (!quantize) return 2;
    pst::Activations q;
    if (m.layout != pst::FLOATS) {
        q.reserve(tokens, m.columns);
        q.begin(m, in_bytes);
        for (int64_t t = 0; t < tokens; ++t) quantize(m, x + t * m.columns, t, q);
    }
    const int64_t room = pst::room_for(m.columns);
    std::vector<uint8_t> rooms(size_t(room * threads));
    pst::Pool pool;
    pool.grow(threads);
    pool.wake(threads);
    pool.run(threads, [&](int64_t i, int thread) {
        kernels.product({m, x, q, tokens, m.blocks() * i / threads, m.blocks() * (i + 1) / threads, y, m.rows,
                         rooms.data() + room * thread});
    });
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

PST_API void pst_decoder_angles(void* decoder, const float* cosines, const float* sines, int64_t half, int neighbours) {
    static_cast<pst::Decoder*>(decoder)->angles.push_back({cosines, sines, half, neighbours != 0});
}

// which: one of LinearName, or -1 for the head, which ignores `layer`.
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

// which: one of NormName, or -1 for the last norm. bias: null for a root-mean-square norm.
PST_API void pst_decoder_norm(void* decoder, int64_t layer, int which, const float* gain, const float* bias, float epsilon) {
    auto& d = *static_cast<pst::Decoder*>(decoder);
    (which < 0 ? d.last_norm : d.layers[size_t(layer)].norm[which]) = {gain, bias, epsilon};
}

// numbers: parameters of the layer's activation, four of XIELU.
PST_API void pst_decoder_activation(void* decoder, int64_t layer, const float* numbers) {
    static_cast<pst::Decoder*>(decoder)->layers[size_t(layer)].activation = numbers;
}

PST_API void pst_decoder_attention(void* decoder, int64_t layer, int64_t window, int64_t rotary) {
    auto& d = *static_cast<pst::Decoder*>(decoder);
    d.layers[size_t(layer)].window = window;
    d.layers[size_t(layer)].rotary = rotary;
}

PST_API void pst_decoder_embedding(void* decoder, const void* rows, const uint16_t* scales, int bits, int64_t group, float scale) {
    auto& d = *static_cast<pst::Decoder*>(decoder);
    const int64_t width = d.shape.hidden;
    d.embedding = {static_cast<const uint8_t*>(rows), scales, bits, width, group ? group : std::max<int64_t>(1, width), scale};
}

PST_API void pst_decoder_copy(void* decoder, int64_t from, int64_t to, int64_t length) {
    static_cast<pst::Decoder*>(decoder)->copy(from, to, length);
}

// parts: `count` times the numbers and addresses of an Adapter::Part. bits: 16 or 32, of the factors.
PST_API void* pst_adapter_new(int64_t layers, const int64_t* parts, int64_t count, int bits, float beta) try {
    std::unique_ptr<pst::Adapter> adapter(new pst::Adapter{bits, beta, 0, {}});
    adapter->parts.resize(size_t(layers * pst::LINEARS));
    for (int64_t i = 0; i < count; ++i) {
        pst::Adapter::Part p;
        std::memcpy(&p, parts + i * int64_t(sizeof p / sizeof *parts), sizeof p);
        adapter->parts[size_t(p.layer * pst::LINEARS + p.name)].push_back(p);
        adapter->room = std::max(adapter->room, pst::update_room(p.rank, p.columns, p.rows));
    }
    return adapter.release();
} catch (const std::bad_alloc&) {
    return nullptr;
}

PST_API void pst_adapter_free(void* adapter) { delete static_cast<pst::Adapter*>(adapter); }

// adapters: of each token, null for the base model.
PST_API int pst_decoder_run(void* decoder, const int64_t* ids, const int64_t* sequences, const int64_t* positions,
                            const void* const* adapters, int64_t tokens, const int64_t* wanted, int64_t num_wanted,
                            float* logits, int threads, int in_bytes) try {
    const auto of_tokens = reinterpret_cast<const pst::Adapter* const*>(adapters);
    static_cast<pst::Decoder*>(decoder)->run(
        {ids, sequences, positions, wanted, of_tokens, tokens, num_wanted, logits, in_bytes != 0}, threads);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
