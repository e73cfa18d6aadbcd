"""From files to batches: readers, prepared corpora of token shards, sample order, and the loader."""
