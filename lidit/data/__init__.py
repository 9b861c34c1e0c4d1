"""Reading shards: order and resume, decoding, batches."""
