"""What a step eats: tokenizers, the prepared folder (dataset), and batches drawn from it.

moe_jax.prepare writes what is read here. Only ``batches`` needs more than numpy.
"""
