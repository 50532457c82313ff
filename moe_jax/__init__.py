"""Sparse Mixture-of-Experts language models in JAX/Flax: prepare text, train, look inside, sample."""
