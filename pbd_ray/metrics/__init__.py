"""What a detector is worth and what it costs: mAP, its uncertainty, parameters, MACs, latency."""
