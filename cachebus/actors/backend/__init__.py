"""Backend actor, and the pipeline that sends its batches to a store."""
