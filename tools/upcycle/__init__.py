"""A mixture of experts with weights, made of a dense model: every MLP becomes copies of itself and a router."""
