"""Text in, batches out. Nothing here but the pipeline imports jax.

In the order in which a text passes through: ``plays``, ``formats`` and ``sources`` read documents, ``pieces`` cuts
long ones, ``plan`` and ``split`` count them and hold some out, ``tokenizer`` (``byte_pairs``, ``hugging_face``) and
``encode`` make tokens, ``shards`` keeps them on disk. ``prepare`` is the command that does all of it, ``prepared``
opens and checks its folder, ``cache`` finds or makes one for a run. ``packing`` and ``pipeline`` draw batches from it.
"""
