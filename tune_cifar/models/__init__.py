"""The five networks: images (N, 3, 32, 32) to logits (N, 10)."""
