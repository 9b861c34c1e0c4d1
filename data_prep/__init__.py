"""Makes raw collections into shards and caches: filter, shard, caption, precompute."""
