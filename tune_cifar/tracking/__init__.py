"""MLflow as a view of the record: upload, sync, UI."""
