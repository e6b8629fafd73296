"""From a corpus on disk to batches: sources, shards and their index, order, loader."""
