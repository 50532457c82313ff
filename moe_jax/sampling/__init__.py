"""From trained parameters to text: logits processors, the jitted decode loop and the front end."""
