"""Lightning callbacks: exact-resume checkpoints, progress, throughput, rollouts in LIBERO."""
