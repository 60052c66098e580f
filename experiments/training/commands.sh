dtvla benchmark training model=small passes=2 repeats=3 warmup=1
dtvla benchmark training model=small passes=2 repeats=3 warmup=1 dtype=bfloat16
