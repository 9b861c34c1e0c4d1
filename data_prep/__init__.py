"""From raw collections to shards and caches, in the order they are run: sources, shard, precompute."""
