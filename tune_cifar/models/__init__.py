"""The five networks: `MODELS[name](dropout=p)` turns images (N, 3, 32, 32) into logits (N, 10)."""
