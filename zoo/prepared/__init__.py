"""Models prepared for fast inference: fused projections, packed weights, compiled kernels."""
