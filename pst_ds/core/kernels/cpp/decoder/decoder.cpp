// A transformer's decoder as a loop over a table of layers, with packed weights: see pst_ds/inference/decoder.
// matrix.hpp has the layout of weights, activations.hpp that of activations, loop.hpp that of the cache and of a pass.
#include <new>

#include "kernels.hpp"
#include "loop.hpp"
