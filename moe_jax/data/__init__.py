"""Text in, batches out: sources, tokenizers, preparation and the Grain pipeline."""
