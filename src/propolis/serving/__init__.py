"""Inference over the Open Inference Protocol v2, the same in the cloud and on a device."""
