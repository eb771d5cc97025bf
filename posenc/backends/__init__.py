"""One softmax attention, many ways to compute it: `choice` decides, a file a way computes."""
