"""The corpus: job file, shards, prefix plan, graph, results, ledger, report."""
