// Functions that every instruction set provides, and the threads that share the work.
//
// Arrays are fp32 tensors of the runtime, contiguous and at any address; see the files of the functions for their
// shapes. Threads belong to the session: parallel(count, work) calls work(0 .. count - 1) on them, in any order and
// each once, and waits for all. Functions return false if working memory is short.
#pragma once

#include <atomic>

#include "ort_api.hpp"
#include "weight.hpp"

namespace pst {

// Work distributed over a session's threads.
struct Parallel {
    const ort::Api* api;
    const ort::KernelContext* context;
    template <class Work> void operator()(int64_t count, const Work& work) const {
        const auto call = [](void* state, size_t index) { (*static_cast<const Work*>(state))(int64_t(index)); };
        if (count == 1) return work(0);
        ort::Status* status = count ? api->parallel_for(context, call, size_t(count), const_cast<Work*>(&work)) : nullptr;
        if (!status) return;
        api->release(status);  // without threads
        for (int64_t i = 0; i < count; ++i) work(i);
    }
};

// q, k, v and y: (batch, queries or keys, width) with heads of `head` floats side by side, the first at a column given by
// the pointer. mask: added to the scores, (batch, heads, queries, keys) with a stride of 0 where it is shared; or null.
struct AttentionCall {
    const float* q;
    const float* k;
    const float* v;
    const float* mask;
    float* y;
    int64_t batch;
    int64_t queries;
    int64_t keys;
    int64_t heads;
    int64_t key_value_heads;
    int64_t head;
    int64_t q_width;
    int64_t k_width;
    int64_t v_width;
    int64_t y_width;
    int64_t mask_batch;
    int64_t mask_head;
    int64_t mask_query;
    float scale;
};

struct OperatorTable {
    int64_t panel;  // adjacent activations, for Stream::make
    bool (*product)(const Stream&, const float* x, int64_t tokens, const float* bias, int64_t activation, float* y,
                    const Parallel&);
    void (*layer_norm)(const float* x, const float* skip, const float* gain, const float* shift, float epsilon,
                       int64_t width, float* y, float* sum);
    bool (*attention)(const AttentionCall&, const Parallel&);
    bool (*narrow_attention)(const AttentionCall&, const Parallel&) = nullptr;  // products in bf16; null if not supported
};

}  // namespace pst
