"""The actor of a backend, and the pipeline that sends its batches to a store."""
