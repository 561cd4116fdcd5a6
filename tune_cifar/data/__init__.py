"""Images as uint8 tensors, verified and split once."""
