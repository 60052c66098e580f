"""Thoughts before human eyes: a local page that shows them frame by frame, and the decisions made there."""
