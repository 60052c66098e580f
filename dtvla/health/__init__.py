"""What `dtvla doctor` looks at: the machine, the installed packages, and the real simulator's behaviour."""
