dtvla benchmark grpo model=nano env=libero_object
