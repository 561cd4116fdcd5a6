"""Train again, compare, open the test set."""
