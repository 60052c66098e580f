"""The policy: vocabulary, sequence layout, hybrid attention, model, decoding and checkpoints."""
