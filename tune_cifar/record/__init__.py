"""What happened, on disk: the source of truth of which everything else is a view."""
