"""A mixture of experts whose experts differ, made of a dense model: branch, train, mix (arXiv 2403.07816)."""
