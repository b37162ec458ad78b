// The functions of one instruction set. Included once for each, last: the table is how operators() calls into a namespace
// that is compiled for instructions which this processor may lack.

inline OperatorTable table() { return {PANEL, sparse_product<Parallel>, layer_norm, attention<Parallel>}; }
