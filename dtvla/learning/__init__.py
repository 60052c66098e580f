"""LightningModules, optimiser groups, schedules, metrics and the run folder."""
