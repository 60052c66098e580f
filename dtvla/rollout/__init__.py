"""Episodes: a policy meets environments, and what happened is recorded."""
