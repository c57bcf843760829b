"""The student's weights into the rollout engine, after every optimizer step.

    publisher = WeightPublisher(student, format, ...)      every rank; the engine's format decides which transport
    for payload in publisher.stream(): ...                 a collective; payloads come out where engines are
    engine.update_weights(payloads, version)               samples come from the new weights once it returns

format.py        WeightFormat (what an engine takes) and the payloads
publisher.py     WeightPublisher: which transport serves which format
fan_out.py       from rank 0 to the engines of all ranks, each node once
gathered.py      transport: full Hugging Face tensors, gathered in bounded buckets
shard_files.py   transport: each rank's shards, put down for the engine's worker of the same rank
sharded.py       the trainer's shards turned into the engine's, for `shard_files`
streaming.py     one bucket on its way while the last one is used
bucket_store.py  where a bucket lies on a node: `bucket_files` in files, `bucket_buffers` in memory that engines map

A new transport is a file with a `stream()` and a line in `WeightPublisher._choose_transport`.
"""
