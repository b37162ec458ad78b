// A transformer's decoder as a loop over a table of layers, with packed weights: see pst_ds/inference/decoder.
#include <new>

#include "kernels.hpp"
#include "loop.hpp"
