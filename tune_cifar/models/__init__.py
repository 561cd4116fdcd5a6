"""The five networks: images (N, 3, H, W) to logits (N, classes)."""
