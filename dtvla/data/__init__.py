"""Demonstrations: LeRobot datasets, the image pipeline, normalisation, sampling and collation."""
