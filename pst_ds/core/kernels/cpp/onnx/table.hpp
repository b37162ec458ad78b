// The functions of one instruction set. Included once for each, last.

inline OperatorTable table() { return {PANEL, sparse_product<Parallel>, layer_norm, attention<Parallel>}; }
