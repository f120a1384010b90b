"""One plan over all shards: sorted runs, ranges of keys, slices that answer rows of several shards, and a manifest."""
