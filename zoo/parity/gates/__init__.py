"""Round trips between dialects. The gate of planted bugs is `zoo.diagnosis.gate`."""
