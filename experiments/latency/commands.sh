dtvla benchmark latency model=small dtype=bfloat16
dtvla benchmark latency model=small dtype=float32 repeats=5
dtvla benchmark throughput model=small dtype=bfloat16 'batch_sizes=[1,4,8]' published_limit=4 repeats=3 warmup=1
