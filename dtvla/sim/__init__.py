"""LIBERO as a gymnasium environment, a pool of worker processes, and a scripted expert. Never imports torch."""
