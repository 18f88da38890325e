"""Models prepared for fast inference: fused projections, packed weights, kernels in C, int8."""
