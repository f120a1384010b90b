"""All shards as one corpus: whether to, its way through the graph, and slices with rows of several shards."""
