"""Chains of thought: what the expert says about a scene, and what a thought must look like."""
