"""Pictures of batches, charts, and the report of a run."""
