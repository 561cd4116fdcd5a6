"""One training: epoch by epoch, resumable, bit for bit."""
