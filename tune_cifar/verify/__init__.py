"""Claims verified: runs trained again, searches confirmed, the test set, exported files."""
