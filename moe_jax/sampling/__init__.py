"""From trained parameters to text: logits processors, the jitted decode loop, the engine and ``load``."""
