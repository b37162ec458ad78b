"""Predict with classifiers, regressors and embedding models, from texts in memory or in a file."""
